"""Thresholds without defects: set by the training itself, and from images by `calibrate`."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.cli import main
from anomalib_metarefine.deploy.threshold import calibrate
from anomalib_metarefine.model.calibration import calibrate_checkpoint, calibrate_model, raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.export import write_metadata
from tests.conftest import folder, part
from tests.model.test_lightning_model import SMALL, engine, trained


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A checkpoint of a model trained on 24 plates and never validated, and 60 new plates."""
    root = tmp_path_factory.mktemp("calibration")
    rng = np.random.default_rng(0)
    for name, count, defect in [("train/good", 24, False), ("test/good", 4, False), ("test/blob", 4, True)]:
        (root / name).mkdir(parents=True)
        for i in range(count):
            part(rng, defect=defect).save(root / name / f"{i:03d}.png")
    (root / "new").mkdir()
    for i in range(60):
        part(rng).save(root / "new" / f"{i:03d}.png")
    runner = engine(root, limit_val_batches=0)
    runner.fit(MetaRefine(**SMALL), datamodule=folder(root))
    return runner.trainer.checkpoint_callback.best_model_path, sorted((root / "new").iterdir()), root


def test_a_model_has_a_threshold_without_validation(fitted):
    checkpoint, new, root = fitted
    model = load_checkpoint(checkpoint)
    scores = raw_scores(model, new).image
    assert (scores > model.post_processor.image_threshold.item()).mean() <= 0.05
    defects = raw_scores(model, sorted((root / "test" / "blob").iterdir())).image
    assert (defects > model.post_processor.image_threshold.item()).all()
    assert model.calibration["source"].startswith("leave-one-out")
    assert model.calibration["images"] == 24


def test_rejected_training_images_are_left_out_and_accounted_for(fitted):
    model = load_checkpoint(fitted[0])
    scores = np.array(model.left_out_scores)
    rejected = np.argsort(scores)[-3:]
    kept = [i not in rejected for i in range(len(scores))]
    model.refinement = dataclasses.replace(model.refinement, kept=kept)
    found = calibrate_model(model).calibration
    wanted = calibrate(np.delete(scores, rejected), left_out=3)
    assert (found.threshold, found.bound, found.images, found.set_aside) == (
        wanted.threshold, wanted.bound, 24, wanted.set_aside,
    )  # fmt: skip


def test_a_validation_replaces_it(datamodule, tmp_path):
    model, runner = trained(datamodule, tmp_path)
    graph = tmp_path / "model.pt"
    graph.touch()
    assert json.loads(write_metadata(model, graph, "torch", "FP32", None).read_text())["calibration"] is None
    runner.validate(model, datamodule=datamodule)
    calibrate_model(model)
    assert json.loads(write_metadata(model, graph, "torch", "FP32", None).read_text())["calibration"]["images"] == 24


def test_calibrated_checkpoint(fitted, tmp_path):
    checkpoint, new, _ = fitted
    out = tmp_path / "new" / "calibrated.ckpt"
    found, _ = calibrate_checkpoint(checkpoint, out, new, false_alarm_rate=0.1, confidence=0.9)
    model = load_checkpoint(out)
    scores = raw_scores(model, new)
    assert model.post_processor.image_threshold.item() == pytest.approx(found.threshold)
    assert (scores.image > found.threshold).mean() <= 0.1
    assert (scores.pixel > model.post_processor.pixel_threshold.item()).mean() <= 0.1
    assert model.calibration["threshold"] == found.threshold
    assert found.method == "order statistic"
    before = load_checkpoint(checkpoint)
    image = torch.rand(2, 3, 96, 96)
    assert torch.equal(model.model(image).pred_score, before.model(image).pred_score)
    assert model.refinement == before.refinement
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        calibrate_checkpoint(checkpoint, out, new)


def test_the_mask_has_a_threshold_of_its_own(fitted):
    checkpoint, new, _ = fitted
    model = load_checkpoint(checkpoint)
    calibrate_model(model, new, false_alarm_rate=0.1, confidence=0.9)
    with torch.no_grad():
        maps = torch.stack([model.model(image).anomaly_map for image in prepared(model, new)])
    highest = maps.amax((1, 2, 3, 4)).double().numpy()
    assert model.post_processor.pixel_threshold.item() == pytest.approx(
        calibrate(highest, 0.1, 0.9).threshold, rel=1e-4
    )


def prepared(model, paths) -> list[torch.Tensor]:
    images = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]
    return [model.pre_processor.transform(image.permute(2, 0, 1)[None].float() / 255) for image in images]


def test_normal_images_are_not_clamped(fitted):
    checkpoint, new, _ = fitted
    model = load_checkpoint(checkpoint)
    calibrate_model(model, new)
    with torch.no_grad():
        raw = model.model(torch.cat(prepared(model, new)))
    scores = model.post_processor(raw).pred_score
    assert 0 < scores.min() < scores.max() < 1


def test_training_and_unreadable_images_are_left_out(fitted, tmp_path, caplog):
    checkpoint, new, root = fitted
    broken = tmp_path / "broken.png"
    broken.write_bytes(new[0].read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        found, _ = calibrate_model(load_checkpoint(checkpoint), [*new, broken, *(root / "train" / "good").iterdir()])
    assert found.images == 60
    assert "24 images are left out: the model was trained on them" in caplog.text
    assert "broken.png is left out" in caplog.text


def test_what_cant_be_calibrated(fitted, datamodule, tmp_path):
    checkpoint, new, _ = fitted
    model = load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="20"):
        calibrate_model(model, new[:5])
    model.settings = model.settings.__class__(shrinkage=1.0)
    with pytest.raises(ValueError, match="shrinkage=1"):
        calibrate_model(model)
    model.post_processor = None
    with pytest.raises(ValueError, match="no post-processor"):
        calibrate_model(model, new)


def test_command(fitted, tmp_path, capsys):
    checkpoint, new, _ = fitted
    out = tmp_path / "calibrated.ckpt"
    assert main(["calibrate", checkpoint, "--data", str(new[0].parent), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "from 60 images" in told
    assert "so few images can't promise it" in told
    assert main(["calibrate", checkpoint, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["calibrate", str(new[0]), "--out", str(tmp_path / "x.ckpt")]) == 2
    assert "not a checkpoint that can be read" in capsys.readouterr().err


def test_training_images_are_known_by_content_wherever_they_lie(fitted, tmp_path, caplog, capsys):
    """Their scores are too low: a threshold from them called every unseen image anomalous, and nobody was told."""
    checkpoint, new, root = fitted
    moved = tmp_path / "moved"
    shutil.copytree(root / "train" / "good", moved)
    for path in new:
        shutil.copy(path, moved / f"new_{path.name}")
    (moved / "link.png").symlink_to(root / "train" / "good" / "000.png")
    with caplog.at_level(logging.WARNING):
        found, _ = calibrate_model(load_checkpoint(checkpoint), sorted(moved.iterdir()))
    assert found.images == 60
    assert "25 images are left out: the model was trained on them" in caplog.text
    assert main(["calibrate", checkpoint, "--data", str(root / "train"), "--out", str(tmp_path / "x.ckpt")]) == 2
    assert "the model was trained on 24" in capsys.readouterr().err
    assert not (tmp_path / "x.ckpt").exists()


def test_labelled_images_say_what_the_threshold_finds(fitted, tmp_path, capsys):
    checkpoint, new, root = fitted
    data = tmp_path / "data"
    shutil.copytree(new[0].parent, data / "good")
    shutil.copytree(root / "test" / "blob", data / "blob")
    shutil.copytree(root / "test" / "blob", data / "ground_truth" / "blob")  # masks are no images
    assert main(["calibrate", checkpoint, "--data", str(data), "--out", str(tmp_path / "x.ckpt")]) == 0
    told = capsys.readouterr().out
    assert "from 60 images, by" in told  # defective ones are not calibrated on
    assert "4 of 4 defective images found, 0 of 60 normal images called anomalous" in told
    assert told.count("100%\n") == 4  # at 1, 2, 5 and 10 % false alarms


def test_a_threshold_that_finds_nothing_is_told_in_capitals(fitted, tmp_path, capsys):
    checkpoint, new, _ = fitted
    data = tmp_path / "data"
    shutil.copytree(new[0].parent, data / "good")
    (data / "scratch").mkdir()
    for seed in range(3):  # as good as the others
        part(np.random.default_rng(100 + seed)).save(data / "scratch" / f"{seed}.png")
    assert main(["calibrate", checkpoint, "--data", str(data), "--out", str(tmp_path / "x.ckpt")]) == 0
    assert "NOT ONE OF 3 DEFECTIVE IMAGES IS FOUND" in capsys.readouterr().out


def test_few_left_out_scores_promise_nothing_and_it_is_said(fitted, tmp_path, caplog):
    checkpoint, new, _ = fitted
    assert main(["calibrate", checkpoint, "--out", str(tmp_path / "x.ckpt")]) == 0
    assert "Left-out scores of 24 training images can't carry a promise" in caplog.text
    caplog.clear()
    assert main(["calibrate", checkpoint, "--data", str(new[0].parent), "--out", str(tmp_path / "y.ckpt")]) == 0
    assert "can't carry" not in caplog.text


def test_settings_are_checked_before_anything_is_scored(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_metarefine.model.calibration.raw_scores", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match="false_alarm_rate must be a share"):
        calibrate_checkpoint(fitted[0], tmp_path / "x.ckpt", fitted[1], false_alarm_rate=2)
    assert list(tmp_path.iterdir()) == []
