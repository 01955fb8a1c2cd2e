import math

import pandas as pd
import pytest
import torch
from anomalib.engine import Engine
from anomalib.models import EfficientAd
from lightning import seed_everything
from PIL import Image

from anomalib_metarefine.benchmark.memo import Memo
from anomalib_metarefine.benchmark.models import ModelSpec, build
from anomalib_metarefine.benchmark.training import quiet, train_and_test
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from tests.conftest import folder

SIZE = (64, 96)
SHARED = (OFFLINE_BACKBONE, ["blocks.2", "blocks.4"])
OURS = "studies.baselines"
SPECS = [
    ModelSpec("MetaRefine", "MetaRefine", {"meta_steps": 2, "dimensions": 16, "rule": "share:0.1"}, batch_size=8),
    ModelSpec("PaDiM", "Padim", {"n_features": 10}, batch_size=8),
    ModelSpec("DFM", "Dfm", batch_size=8),
    ModelSpec("PatchCore", f"{OURS}.patchcore.QuickPatchcore", {"coreset_sampling_ratio": 0.02}, batch_size=8),
    ModelSpec("SoftPatch", f"{OURS}.softpatch.SoftPatch", {"coreset_sampling_ratio": 0.02}, batch_size=8),
    ModelSpec(
        "FastFlow",
        f"{OURS}.fastflow.FastflowOnFeatures",
        {"flow_steps": 2, "hidden_ratio": 0.16, "max_steps": 7},
        batch_size=8,
    ),
    ModelSpec("CFlow", "Cflow", {"coupling_blocks": 1, "fiber_batch_size": 96}, batch_size=8, max_epochs=1),
]
COSTS = ["fit_seconds", "feature_seconds", "test_seconds", "images_per_second", "peak_memory_mb"]


def table(parts):
    """Training and test samples; labels that no model can learn, or all would agree on 1.0 whatever they did."""
    datamodule = folder(parts, train_batch_size=8, eval_batch_size=1, val_split_mode="none")
    datamodule.setup()
    datamodule._is_setup = True
    datamodule.test_data.samples = datamodule.test_data.samples.assign(label_index=[0, 1] * 8)
    return datamodule, datamodule.train_data.samples, datamodule.test_data.samples


def plain(spec, datamodule, seed, monkeypatch, folder):
    """anomalib as a user runs it: its datamodule, its features, its blur."""
    monkeypatch.chdir(folder)
    seed_everything(seed, verbose=False)
    model = build(spec, *SHARED, SIZE)
    engine = Engine(logger=False, enable_progress_bar=False, limit_val_batches=0, max_epochs=spec.max_epochs)
    engine.fit(model, datamodule=datamodule)
    engine.test(model, datamodule=datamodule, verbose=False)
    return model.evaluator.figures


def found_by(figures):
    """All but the costs, to the last digit; NaN is not equal to itself."""
    return repr({name: value for name, value in figures.items() if name not in COSTS})


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_memoised_equals_plain(spec, parts, tmp_path, monkeypatch):
    quiet()
    datamodule, train, test = table(parts)
    expected = plain(spec, datamodule, 3, monkeypatch, tmp_path)
    memo = Memo()
    cold, rejected = train_and_test(spec, *SHARED, train, test, SIZE, 3, memo)
    kept = len(memo)
    warm, _ = train_and_test(spec, *SHARED, train, test, SIZE, 3, memo)
    assert len(memo) == kept > 0  # the second training embedded nothing
    assert 0.05 < cold["image_AUROC"] < 0.95
    for name in ("image_AUROC", "image_AUPR", "image_F1Max"):
        assert cold[name] == pytest.approx(expected[name], abs=1e-6)
    assert found_by(warm) == found_by(cold)
    assert (rejected is None) == (spec.name != "MetaRefine")


def test_a_full_memo_changes_nothing(parts):
    _, train, test = table(parts)
    found = [train_and_test(SPECS[1], *SHARED, train, test, SIZE, 0, Memo(limit))[0] for limit in (1000, 0.3)]
    assert found_by(found[0]) == found_by(found[1])


def test_costs_do_not_depend_on_what_was_done_before(parts):
    _, train, test = table(parts)
    memo = Memo()
    cold, _ = train_and_test(SPECS[2], *SHARED, train, test, SIZE, 0, memo)
    spent = memo.seconds
    warm, _ = train_and_test(SPECS[2], *SHARED, train, test, SIZE, 0, memo)
    assert memo.seconds == spent
    assert warm["feature_seconds"] == cold["feature_seconds"] > 0
    assert 0 < cold["fit_seconds"] < 10
    assert 0 < cold["test_seconds"] < 10
    assert cold["images_per_second"] > 1
    assert 12 < cold["model_mb"] < 14  # the backbone without its head has 12
    assert math.isnan(cold["peak_memory_mb"]) or 0 < cold["peak_memory_mb"] < 2000
    assert all(math.isnan(cold[name]) for name in ("pixel_AUROC", "pixel_AUPIMO"))


def test_another_seed_is_another_training(parts):
    _, train, test = table(parts)
    memo = Memo()
    found = [train_and_test(SPECS[1], *SHARED, train, test, SIZE, seed, memo)[0] for seed in (0, 1)]
    assert found_by(found[0]) != found_by(found[1])


def test_nothing_is_written(parts, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TMPDIR", str(work))
    monkeypatch.setattr("tempfile.tempdir", None)
    _, train, test = table(parts)
    train_and_test(SPECS[2], *SHARED, train, test, SIZE, 0, Memo())
    assert list(work.iterdir()) == []


def test_what_metarefine_rejected(parts):
    _, train, test = table(parts)
    dirty = test[test.image_path.astype(str).str.contains("blob")].iloc[:3]
    together = pd.concat([train, dirty.assign(label_index=0, split="train")], ignore_index=True)
    together.attrs = train.attrs
    spec = ModelSpec("x", "MetaRefine", {"rule": "share:0.12", "meta_steps": 1}, batch_size=8)
    _, rejected = train_and_test(spec, *SHARED, together, test, SIZE, 0, Memo())
    assert set(rejected) == set(dirty.image_path.astype(str))


def test_a_model_that_never_stops(parts):
    _, train, test = table(parts)
    with pytest.raises(ValueError, match="Cflow does not know when to stop.*max_epochs or max_steps of CFlow"):
        train_and_test(ModelSpec("CFlow", "Cflow"), *SHARED, train, test, SIZE, 0, Memo())


def test_reverse_distillation_on_its_own_backbone(parts):
    _, train, test = table(parts)
    spec = ModelSpec(
        "RD", "ReverseDistillation", {"backbone": "resnet18", "pre_trained": False}, batch_size=8, max_steps=2
    )
    found, _ = train_and_test(spec, *SHARED, train, test, SIZE, 0, Memo())
    assert 0 <= found["image_AUROC"] <= 1
    assert found["feature_seconds"] > 0  # its encoder is frozen


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """What EfficientAd downloads: a teacher, and natural images."""
    weights = tmp_path / "weights/efficientad_pretrained_weights"
    weights.mkdir(parents=True)
    torch.save(EfficientAd(teacher_out_channels=8).model.teacher.state_dict(), weights / "pretrained_teacher_small.pth")
    monkeypatch.setattr(
        "anomalib.models.image.efficient_ad.lightning_model.get_pretrained_weights_dir", lambda: weights.parent
    )
    images = tmp_path / "imagenette/class"
    images.mkdir(parents=True)
    Image.effect_noise((64, 64), 90).convert("RGB").save(images / "0.png")
    return images.parent


@pytest.mark.slow  # its networks are large
def test_efficient_ad_on_its_own_teacher(parts, teacher, monkeypatch):
    _, train, test = table(parts)
    seen = []
    quantiles = EfficientAd.map_norm_quantiles
    monkeypatch.setattr(
        EfficientAd, "map_norm_quantiles", lambda self, loader: seen.append(loader.dataset) or quantiles(self, loader)
    )
    spec = ModelSpec(
        "EfficientAd",
        "EfficientAd",
        {"imagenet_dir": str(teacher), "teacher_out_channels": 8},
        batch_size=1,
        max_steps=2,
    )
    found, _ = train_and_test(spec, *SHARED, train[:2], test[:2], (256, 256), 0, Memo())
    assert 0 <= found["image_AUROC"] <= 1
    assert math.isnan(found["feature_seconds"])  # it shares none
    (validation,) = seen  # it takes its units from there: never from the test set
    assert validation.samples.image_path.tolist() == train[:2].image_path.tolist()


def test_a_download_that_cannot_be_had(parts, tmp_path, monkeypatch):
    from urllib.error import URLError

    def download(*_args):
        raise URLError("no route to host")

    module = "anomalib.models.image.efficient_ad.lightning_model"
    monkeypatch.setattr(f"{module}.download_and_extract", download)
    monkeypatch.setattr(f"{module}.get_pretrained_weights_dir", lambda: tmp_path / "nothing")
    _, train, test = table(parts)
    spec = ModelSpec("EfficientAd", "EfficientAd", batch_size=1, max_steps=5)
    with pytest.raises(RuntimeError, match="EfficientAd needs a download that can't be had here: no route to host"):
        train_and_test(spec, *SHARED, train, test, (256, 256), 0, Memo())


def test_pixel_figures_where_there_are_masks(parts):
    (parts / "masks").mkdir()
    for index in range(8):
        Image.new("L", (96, 96)).save(parts / "masks" / f"{index:03d}.png")
        mask = Image.new("L", (96, 96))
        mask.paste(255, (24, 24, 72, 72))
        mask.save(parts / "masks" / f"{index:03d}.png")
    datamodule = folder(parts, mask_dir="masks", val_split_mode="none")
    datamodule.setup()
    found, _ = train_and_test(
        SPECS[1], *SHARED, datamodule.train_data.samples, datamodule.test_data.samples, SIZE, 0, Memo()
    )
    assert found["image_AUROC"] > 0.9  # bright blobs
    assert found["pixel_AUROC"] > 0.8
    assert all(0 <= value <= 1 for value in (found["pixel_AUPR"], found["pixel_F1Max"], found["pixel_AUPRO"]))
