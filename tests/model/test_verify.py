import json
import shutil

import numpy as np
import pytest
import torch

from anomalib_metarefine.cli import main
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.sidecar import SIDECAR
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.verify import verify_deployment


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Ten good and ten defective solar cells, in a folder each."""
    root = tmp_path_factory.mktemp("cells")
    samples = make_elpv_samples(packaged_root(), "mono")
    for label, name in ((0, "good"), (1, "cracked")):
        (root / name).mkdir()
        for path in samples.image_path[samples.label_index == label][-10:]:
            shutil.copy(path, root / name)
    return root


def altered(trained, folder, change):
    """A copy of the deployed model with other metadata."""
    shutil.copytree(trained.folder, folder)
    content = json.loads((folder / SIDECAR).read_text())
    change(content)
    (folder / SIDECAR).write_text(json.dumps(content))
    return folder


def test_a_good_deployment(trained, cells):
    found = verify_deployment(trained.folder, trained.checkpoint, sorted(cells.rglob("*.png")), runs=20)
    assert found.problems == []
    assert found.decisions_differ == []
    assert (found.images, found.precision) == (20, "FP32")
    assert found.largest_difference < 1e-3
    assert found.auroc[0] == pytest.approx(found.auroc[1])
    assert 0 < found.latency_ms["p50"] <= found.latency_ms["p95"] <= found.latency_ms["p99"]
    assert found.images_per_second > 0


def test_another_checkpoint(trained, cells, tmp_path):
    content = torch.load(trained.checkpoint, weights_only=True)
    content["state_dict"]["post_processor._image_threshold"] += 5
    content["state_dict"]["model.scorer.shift"] += 0.3
    content["metarefine"]["provenance"]["seed"] = 17
    other = tmp_path / "other.ckpt"
    torch.save(content, other)
    found = verify_deployment(trained.folder, other, sorted(cells.rglob("*.png")), runs=2)
    told = "\n".join(found.problems)
    assert "threshold of image_score" in told
    assert "seed of the training is 0 in metadata.json, 17 here" in told
    assert "scores differ" in told


def test_decisions_that_differ_are_named(trained, cells, tmp_path):
    """A threshold in the metadata that is not the graph's moves the raw scores, and with them the decisions."""

    def shift(content):
        content["image_score"]["threshold"] *= 1.2

    found = verify_deployment(
        altered(trained, tmp_path / "model", shift), trained.checkpoint, sorted(cells.rglob("*.png")), runs=2
    )
    assert found.decisions_differ
    assert any("decided differently" in problem for problem in found.problems)


def test_a_scale_that_metadata_lacks(trained, cells, tmp_path):
    folder = altered(trained, tmp_path / "model", lambda content: content["anomaly_map"].update(threshold=None))
    found = verify_deployment(folder, trained.checkpoint, sorted(cells.rglob("*.png"))[:2], runs=2)
    assert any(problem.startswith("threshold of anomaly_map is nan in metadata.json") for problem in found.problems)


def test_a_ranking_that_suffers(trained, cells, monkeypatch):
    """As INT8 might: single scores may move then, but not so that defects fall behind."""
    paths = sorted(cells.rglob("*.png"))
    moved = raw_scores(trained.model, paths)
    defective = np.array([path.parent.name == "cracked" for path in paths])
    better = moved._replace(image=moved.image * np.where(defective, 1.05, 0.95))
    monkeypatch.setattr("anomalib_metarefine.model.verify.raw_scores", lambda *args, **settings: better)
    found = verify_deployment(trained.folder, trained.checkpoint, paths, runs=2)
    assert any(problem.startswith("image AUROC falls from") for problem in found.problems)


def test_changed_files_are_refused(trained, cells, tmp_path):
    folder = altered(trained, tmp_path / "model", lambda content: None)
    with (folder / "model.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"model.bin is not the file that was exported"):
        verify_deployment(folder, trained.checkpoint, sorted(cells.rglob("*.png")))


def test_without_images_or_metadata(trained, cells, tmp_path):
    with pytest.raises(ValueError, match="no image"):
        verify_deployment(trained.folder, trained.checkpoint, [])
    bare = altered(trained, tmp_path / "model", lambda content: None)
    (bare / SIDECAR).unlink()
    with pytest.raises(ValueError, match=r"no metadata.json with a threshold"):
        verify_deployment(bare, trained.checkpoint, sorted(cells.rglob("*.png")))


def test_command(trained, cells, tmp_path, capsys):
    arguments = ["--ckpt", str(trained.checkpoint), "--data", str(cells), "--runs", "2", "--limit", "7"]
    written = tmp_path / "figures.json"
    assert main(["verify", str(trained.folder), *arguments, "--out", str(written)]) == 0
    told = capsys.readouterr().out
    assert "decides like the checkpoint" in told
    assert "throughput" in told
    assert json.loads(written.read_text())["images"] == 7
    wrong = altered(trained, tmp_path / "model", lambda content: content["training"].update(seed=5))
    assert main(["verify", str(wrong), *arguments]) == 1
    assert "seed of the training is 5" in capsys.readouterr().err
    assert main(["verify", str(wrong), "--ckpt", str(tmp_path / "none.ckpt"), "--data", str(cells)]) == 2
