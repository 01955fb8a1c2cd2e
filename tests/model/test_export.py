"""Exported models score like the checkpoint: torch, ONNX through OpenVINO, OpenVINO; real images where they are."""

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image

from anomalib_metarefine import ELPV, MetaRefine
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root

# On processors with bfloat16 OpenVINO computes in it unless told otherwise; see docs/deployment.md.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model trained on 40 real solar cells with default settings, and its three exports."""
    root = tmp_path_factory.mktemp("export")
    seed_everything(0, verbose=False)
    datamodule = ELPV(train_images=40)
    datamodule.setup()
    datamodule.test_data = datamodule.test_data.subsample(range(0, len(datamodule.test_data), 30))
    datamodule.val_data = datamodule.test_data
    engine = Engine(default_root_dir=root, logger=False, accelerator="cpu")
    engine.fit(MetaRefine(visualizer=False), datamodule=datamodule)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    paths = {
        kind: Engine(accelerator="cpu").export(MetaRefine(), export_type=kind, export_root=root, ckpt_path=checkpoint)
        for kind in ("torch", "onnx", "openvino")
    }
    return MetaRefine.load_from_checkpoint(checkpoint).eval(), paths


def real_images(count: int, size: tuple[int, int] | None) -> list[np.ndarray]:
    files = make_elpv_samples(packaged_root(), "mono").image_path
    images = [Image.open(path).convert("RGB") for path in files[:: len(files) // count][:count]]
    return [np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC) if size else image) for image in images]


@pytest.mark.parametrize(("size", "count"), [((256, 256), 50), (None, 10), ((512, 512), 5), ((200, 640), 5)])
def test_scores_agree_at_every_size(exported, size, count):
    model, paths = exported
    core = ov.Core()
    compiled = {kind: core.compile_model(paths[kind], "CPU", EXACT) for kind in ("onnx", "openvino")}
    frozen = torch.load(paths["torch"], weights_only=False)["model"].eval()
    post = model.post_processor
    for image in real_images(count, size):
        batch = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).float() / 255
        with torch.no_grad():
            raw = model.model(model.pre_processor.transform(batch))  # as in training and testing
            expected = post._normalize(raw.pred_score, post.image_min, post.image_max, post.image_threshold).item()
            scores = {"torch": frozen(batch).pred_score.item()}
        for kind, network in compiled.items():
            scores[kind] = network(batch.numpy())["pred_score"].item()
        for score in scores.values():
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_batches_of_any_length(exported):
    _, paths = exported
    network = ov.Core().compile_model(paths["openvino"], "CPU", EXACT)
    images = np.stack(real_images(3, (256, 256))).transpose(0, 3, 1, 2).astype(np.float32) / 255
    together = network(images)
    assert together["anomaly_map"].shape == (3, 1, 256, 256)
    alone = [network(images[i : i + 1])["pred_score"].item() for i in range(3)]
    np.testing.assert_allclose(together["pred_score"].ravel(), alone, rtol=1e-4)


def test_inferencers_of_anomalib(exported, tmp_path, monkeypatch):
    _, paths = exported
    monkeypatch.chdir(tmp_path)  # the inferencer writes a cache folder into the working directory
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = make_elpv_samples(packaged_root(), "mono").image_path[0]
    openvino = OpenVINOInferencer(paths["openvino"], device="CPU", config=EXACT).predict(path)
    torch_ = TorchInferencer(paths["torch"], device="cpu").predict(path)
    assert openvino.pred_score.item() == pytest.approx(torch_.pred_score.item(), rel=1e-3)
    assert bool(openvino.pred_label.item()) == bool(torch_.pred_label.item())
