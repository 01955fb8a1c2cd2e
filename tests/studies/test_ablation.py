import shutil

import pandas as pd

from studies import ablation

START = {"meta_steps": 1, "episodes": 1, "batch_patches": 64}


def test_every_start_and_refinement_has_a_row_and_none_is_repeated(parts, tmp_path, monkeypatch, capsys):
    names = ("MAML", ablation.OTHERS, "full training on what is kept")
    starts = {name: ablation.STARTS[name] | START for name in names}
    monkeypatch.setattr(ablation, "STARTS", {"random": {"meta_steps": 0}} | starts)
    shutil.copytree(parts, tmp_path / "others")
    out = tmp_path / "ablation.csv"
    data = [f"{parts}@64x64:24:parts", f"{tmp_path / 'others'}@64x64:20:others"]
    command = ["--out", str(out), "--seeds", "0", "--contamination", "0.125", "--data"]
    ablation.main([*command, *data, "--refinements", "none", "likelihood"])
    first = pd.read_csv(out)
    assert len(first) == 2 * len(ablation.STARTS) * 2
    ablation.main([*command, data[0]])
    rows = pd.read_csv(out)
    assert len(rows) == len(first) + len(ablation.STARTS) - 1
    assert rows[: len(first)].equals(first)
    assert "### Refinement: neighbours" in capsys.readouterr().out
    assert rows.image_AUROC.min() > 0.9
    # Whatever the start, neighbours reject the same images.
    assert rows[rows.refinement == "neighbours"].rejected.nunique() == 1
