import shutil

import pandas as pd
import pytest

from anomalib_metarefine.cli import main
from studies import ablation

START = {"meta_steps": 1, "episodes": 1, "batch_patches": 64}


@pytest.fixture
def quick(monkeypatch):
    """One initialisation of each kind, trained for one step."""
    names = ("MAML", "MAML over other data sets", "full training on what is kept")
    starts = {name: ablation.STARTS[name] | START for name in names}
    monkeypatch.setattr(ablation, "STARTS", {"random": {"meta_steps": 0}} | starts)


def test_every_start_and_refinement_has_a_row_and_none_is_repeated(parts, tmp_path, quick, capsys):
    shutil.copytree(parts, tmp_path / "others")
    out = tmp_path / "ablation.csv"
    data = [f"{parts}@64x64:24:parts", f"{tmp_path / 'others'}@64x64:20:others"]
    command = ["ablation", "--out", str(out), "--seeds", "0", "--contamination", "0.125", "--data"]
    assert main([*command, *data, "--refinements", "none", "likelihood"]) == 0
    first = pd.read_csv(out)
    assert len(first) == 2 * len(ablation.STARTS) * 2
    capsys.readouterr()
    assert main([*command, data[0]]) == 0
    rows = pd.read_csv(out)
    assert len(rows) == len(first) + len(ablation.STARTS) - 1
    assert rows[: len(first)].equals(first)
    printed = capsys.readouterr().out
    assert printed.count("image AUROC") == len(rows) - len(first)
    assert "### Refinement: neighbours" in printed
    assert rows.image_AUROC.min() > 0.9
    assert (rows[rows.refinement == "none"].rejected == 0).all()
    # Whatever the start, neighbours reject the same images.
    assert rows[rows.refinement == "neighbours"].rejected.nunique() == 1


def test_a_trained_start_is_another_density(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "STARTS", {"random": {"meta_steps": 0}, "MAML": START | {"meta_lr": 0.01}})
    out = tmp_path / "ablation.csv"
    data = ["--data", f"{parts}@64x64:24:parts", "--contamination", "0", "--seeds", "0"]
    assert main(["ablation", "--out", str(out), *data, "--refinements", "none"]) == 0
    rows = pd.read_csv(out).set_index("start")
    assert rows.normal_bits["MAML"] != rows.normal_bits["random"]
    assert rows.meta_seconds["MAML"] > rows.meta_seconds["random"]


def test_names_that_do_not_exist_are_named(parts, tmp_path, capsys):
    command = ["ablation", "--out", str(tmp_path / "a.csv"), "--data", f"{parts}:24:parts"]
    assert main([*command, "--starts", "Reptile"]) == 2
    assert "'Reptile'" in capsys.readouterr().err
    assert main([*command, "--refinements", "all"]) == 2
    assert main([*command, "--starts", ablation.OTHERS]) == 2
    assert "at least two data sets" in capsys.readouterr().err
    assert main(["ablation", "--out", str(tmp_path / "a.csv"), "--data", str(parts), "--starts", "random"]) == 2
    assert "WHERE:IMAGES" in capsys.readouterr().err
    assert main([*command, "--contamination", "0.9", "--seeds", "0"]) == 2
    assert "left out" in capsys.readouterr().out


def test_summary_averages_only_what_all_starts_have():
    def row(data, seed, start, auroc):
        key = {"data": data, "train_images": 20, "contamination": 0.2, "seed": seed, "start": start}
        return key | {"refinement": "none", "image_AUROC": auroc, "meta_seconds": 2.0, "backbone_seconds": 4.0}

    rows = [
        row("a", 0, "random", 0.8),
        row("a", 1, "random", 0.9),
        row("a", 0, "MAML", 0.7),
        row("b", 0, "random", 0.1),
    ]
    text = ablation.summarise(pd.DataFrame(rows))
    assert "| a | 20 | 20% | 85.0 ± 7.1 | 70.0 |" in text
    assert "| average |  | 20% | 80.0 | 70.0 |" in text
    assert "| MAML | 0.50 |" in text
