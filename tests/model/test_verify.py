"""Verification notices whatever makes a deployed model decide otherwise than its checkpoint."""

import json
import shutil

import numpy as np
import openvino as ov
import pytest
import torch

from anomalib_metarefine.cli import main
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.sidecar import SIDECAR
from anomalib_metarefine.images.reading import file_hash
from anomalib_metarefine.model.calibration import calibrate_checkpoint, raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.export import export_model
from anomalib_metarefine.model.graph import Graph
from anomalib_metarefine.model.verify import verify_deployment


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Thirty good and ten defective solar cells, in a folder each."""
    root = tmp_path_factory.mktemp("cells")
    samples = make_elpv_samples(packaged_root(), "mono")
    for label, name, count in ((0, "good", 30), (1, "cracked", 10)):
        (root / name).mkdir()
        for path in samples.image_path[samples.label_index == label][-count:]:
            shutil.copy(path, root / name)
    return root


@pytest.fixture(scope="module")
def line(trained, tmp_path_factory):
    """The deployed model, calibrated on images."""
    root = tmp_path_factory.mktemp("line")
    samples = make_elpv_samples(packaged_root(), "mono")
    good = list(samples.image_path[samples.label_index == 0][-60:-30])
    calibrate_checkpoint(trained.checkpoint, root / "line.ckpt", good)
    model = load_checkpoint(root / "line.ckpt")
    return trained._replace(model=model, folder=export_model(model, root).parent, checkpoint=root / "line.ckpt")


@pytest.fixture
def paths(cells):
    return sorted(cells.rglob("*.png"))[::4]


def new_good(trained, cells):
    """Good images that the model was not trained on."""
    return sum(file_hash(path) not in trained.model.training_images.values() for path in (cells / "good").iterdir())


def altered(trained, folder, change):
    """A copy of the deployed model with other metadata."""
    shutil.copytree(trained.folder, folder)
    content = json.loads((folder / SIDECAR).read_text())
    change(content)
    content["files"] = {name: file_hash(folder / name) for name in content["files"]}
    (folder / SIDECAR).write_text(json.dumps(content))
    return folder


def test_a_good_deployment(trained, cells):
    found = verify_deployment(trained.folder, trained.checkpoint, sorted(cells.rglob("*.png")), runs=20)
    assert found.problems == []
    assert found.decisions_differ == []
    assert (found.images, found.precision) == (40, "FP32")
    assert found.largest_difference < 1e-3
    assert found.auroc[0] == pytest.approx(found.auroc[1])
    assert (found.detection.normal, found.detection.defective) == (new_good(trained, cells), 10)
    assert 0 < found.latency_ms["p50"] <= found.latency_ms["p95"] <= found.latency_ms["p99"]
    assert found.images_per_second > 0


def test_another_checkpoint(trained, paths, tmp_path):
    content = torch.load(trained.checkpoint, weights_only=True)
    content["state_dict"]["post_processor._image_threshold"] += 5
    content["state_dict"]["model.scorer.shift"] += 0.3
    content["metarefine"]["provenance"]["seed"] = 17
    other = tmp_path / "other.ckpt"
    torch.save(content, other)
    told = "\n".join(verify_deployment(trained.folder, other, paths, runs=2).problems)
    assert "image_score.threshold is" in told
    assert "training.seed is 0 in metadata.json, 17 by checkpoint and graph" in told
    assert "image scores differ" in told


def test_decisions_that_differ_are_named(line, paths, tmp_path):
    """A band of uncertain scores in the metadata that is not the checkpoint's swallows all decisions."""

    def all_uncertain(content):
        content["calibration"]["uncertain"] |= {"lower": -1e9, "upper": 1e9}

    found = verify_deployment(altered(line, tmp_path / "model", all_uncertain), line.checkpoint, paths, runs=2)
    assert len(found.decisions_differ) >= len(paths) - 2
    assert any("calibration.uncertain.lower is -1000000000.0 in metadata.json" in problem for problem in found.problems)
    assert any("decided differently" in problem for problem in found.problems)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content["anomaly_map"].update(threshold=None), "anomaly_map.threshold is None"),
        (lambda content: content["input"].update(size=[64, 64]), "input.size.0 is 64"),
        (lambda content: content["input"].update(accepts=[300, 300]), "input.accepts.0 is 300"),
        (lambda content: content["input"].update(colour_order="BGR"), "input.colour_order is BGR"),
        (lambda content: content["model"].update(precision="INT8"), "model.precision is INT8 in metadata.json, FP32"),
        (lambda content: content["image_score"].update(normalized_threshold=0.9), "image_score.normalized_threshold"),
        (lambda content: content.update(calibration=None), "calibration.threshold is missing"),
    ],
)
def test_everything_that_decides_is_compared(line, paths, tmp_path, change, told):
    found = verify_deployment(altered(line, tmp_path / "model", change), line.checkpoint, paths[:2], runs=1)
    assert told in "\n".join(found.problems)
    assert found.precision == "FP32"  # by the graph, not by the file under test


def moved(trained, by, path):
    """The checkpoint of a model that scores a little otherwise, with the same metadata."""
    content = torch.load(trained.checkpoint, weights_only=True)
    content["state_dict"]["model.scorer.shift"] += by
    torch.save(content, path)
    return path


def test_another_models_files_with_new_hashes(trained, paths, tmp_path):
    """The tolerance comes from the graph: calling it INT8 in the metadata helps nobody."""
    folder = altered(trained, tmp_path / "model", lambda content: content["model"].update(precision="INT8"))
    found = verify_deployment(folder, moved(trained, 0.02, tmp_path / "other.ckpt"), paths, runs=1)
    assert 1e-3 < found.largest_difference < 0.1
    assert any("image scores differ" in problem for problem in found.problems)


def test_no_resize_is_blamed_because_one_image_agrees(trained, paths, tmp_path, monkeypatch):
    """The first image alone was asked whether another resize explains what differs."""
    real, asked = raw_scores(trained.model, paths), []

    def scores(model, some):
        found = real if len(some) > 1 else real._replace(image=real.image[[paths.index(path) for path in some]])
        asked.append(some)
        return found._replace(image=found.image + (np.arange(len(found.image)) == 2) * (len(some) > 1))

    monkeypatch.setattr("anomalib_metarefine.model.verify.raw_scores", scores)
    found = verify_deployment(trained.folder, trained.checkpoint, paths, runs=1)
    assert any("image scores differ" in problem for problem in found.problems)
    assert asked[1:] == [[paths[2]]]


@pytest.fixture(scope="module")
def far(trained, tmp_path_factory):
    """The deployed model with limits so far off that all its scores are clamped to 0."""
    root = tmp_path_factory.mktemp("far")
    content = torch.load(trained.checkpoint, weights_only=True)
    for kind in ("image", "pixel"):
        limits = {f"_{kind}_threshold": 1.5e3, f"{kind}_min": 1e3, f"{kind}_max": 2e3}
        content["state_dict"] |= {f"post_processor.{name}": torch.tensor(value) for name, value in limits.items()}
    torch.save(content, root / "far.ckpt")
    folder = export_model(load_checkpoint(root / "far.ckpt"), root).parent
    return trained._replace(folder=folder, checkpoint=root / "far.ckpt")


def test_scores_are_compared_before_they_are_clamped(far, paths, tmp_path):
    """Checkpoint and graph differed "by 0" there, whatever their scores."""
    found = verify_deployment(far.folder, moved(far, 0.3, tmp_path / "other.ckpt"), paths, runs=1)
    assert any("image scores differ" in problem for problem in found.problems)


def test_a_detector_that_finds_nothing_does_not_pass(far, cells):
    found = verify_deployment(far.folder, far.checkpoint, sorted(cells.rglob("*.png")), runs=1)
    assert found.problems == ["not one of 10 defective images is found at the threshold"]
    assert found.largest_difference < 1e-3


def test_what_cant_be_compared_is_a_failure(trained, paths, tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    found = verify_deployment(trained.folder, trained.checkpoint, [*paths, broken], runs=1)
    assert "1 images can't be read and were not compared" in found.problems
    with pytest.raises(ValueError, match="None of the 1 images can be read"):
        verify_deployment(trained.folder, trained.checkpoint, [broken])
    monkeypatch.setattr("anomalib_metarefine.model.graph._before_clamp", lambda output: None)
    found = verify_deployment(trained.folder, trained.checkpoint, paths, runs=1)
    assert any("image scores of 10 images could not be compared" in problem for problem in found.problems)


def test_anomalibs_own_export_shows_its_gap_and_where_it_comes_from(trained, paths, tmp_path):
    model = load_checkpoint(trained.checkpoint)
    folder = export_model(model, tmp_path, exact_resize=False).parent
    (folder / SIDECAR).unlink()
    told = "\n".join(verify_deployment(folder, trained.checkpoint, paths, runs=1).problems)
    assert "there is no metadata.json" in told
    assert "image scores differ" in told
    assert "resizes without antialiasing" in told


def test_training_images_are_not_counted_as_false_alarms_or_none(trained, cells, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cells, data)
    for path in trained.model.training_images:
        shutil.copy(path, data / "good")
    paths = sorted(data.rglob("*.png"))
    found = verify_deployment(trained.folder, trained.checkpoint, paths, runs=1)
    assert (found.images, found.detection.normal) == (len(paths), new_good(trained, cells))


def test_a_ranking_that_suffers(trained, cells, monkeypatch):
    """As INT8 might: single scores may move then, but not so that defects fall behind."""
    paths = sorted(cells.rglob("*.png"))
    moved = raw_scores(trained.model, paths)
    defective = np.array([path.parent.name == "cracked" for path in paths])
    better = moved._replace(image=moved.image * np.where(defective, 1.05, 0.95))
    monkeypatch.setattr("anomalib_metarefine.model.verify.raw_scores", lambda *args, **settings: better)
    found = verify_deployment(trained.folder, trained.checkpoint, paths, runs=2)
    assert any(problem.startswith("image AUROC falls from") for problem in found.problems)


def test_changed_files_are_refused(trained, paths, tmp_path):
    folder = altered(trained, tmp_path / "model", lambda content: None)
    with (folder / "model.bin").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"model.bin is not the file that was exported"):
        verify_deployment(folder, trained.checkpoint, paths)


def test_without_images_or_runs(trained, paths):
    with pytest.raises(ValueError, match="no image"):
        verify_deployment(trained.folder, trained.checkpoint, [])
    with pytest.raises(ValueError, match="runs must be at least 1, found 0"):
        verify_deployment(trained.folder, trained.checkpoint, paths, runs=0)


def test_command(trained, cells, tmp_path, capsys):
    arguments = ["--ckpt", str(trained.checkpoint), "--data", str(cells), "--runs", "2"]
    written = tmp_path / "figures.json"
    assert main(["verify", str(trained.folder), *arguments, "--out", str(written)]) == 0
    told = capsys.readouterr()
    assert "decides like the checkpoint" in told.out
    assert "defective images found" in told.out
    assert "throughput" in told.out
    assert "image 1 of 40" in told.err  # not silent for minutes, in a pipe either
    assert json.loads(written.read_text())["images"] == 40
    wrong = altered(trained, tmp_path / "model", lambda content: content["training"].update(seed=5))
    assert main(["verify", str(wrong), *arguments, "--limit", "7"]) == 1
    told = capsys.readouterr()
    assert "training.seed is 5" in told.err
    assert told.out.startswith("7 images, FP32")
    assert main(["verify", str(wrong), "--ckpt", str(tmp_path / "none.ckpt"), "--data", str(cells)]) == 2


@pytest.mark.parametrize("option", ["--limit", "--runs"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_counts_that_are_none_are_a_sentence(trained, cells, capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(trained.folder), "--ckpt", str(trained.checkpoint), "--data", str(cells), option, value])
    assert stopped.value.code == 2
    assert "must be a whole number of at least 1, found" in capsys.readouterr().err


def test_export_command(trained, paths, tmp_path, capsys):
    assert main(["export", str(trained.checkpoint), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert len((told.out + told.err).splitlines()) <= 6  # 1,508 lines of the exporters' own before
    found = verify_deployment(tmp_path / "out" / "weights" / "openvino", trained.checkpoint, paths, runs=1)
    assert [problem for problem in found.problems if "not one of" not in problem] == []


def test_weights_of_eight_bits_are_no_fp32(trained, tmp_path):
    import nncf

    network = nncf.compress_weights(ov.Core().read_model(trained.folder / "model.xml"))
    ov.save_model(network, tmp_path / "model.xml", compress_to_fp16=False)
    assert Graph(tmp_path / "model.xml").precision == "INT8"
