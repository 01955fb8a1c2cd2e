"""Exports of anomalib's own models score like the model at every size, and programs of others read what we export."""

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.models import Patchcore, Stfpm
from PIL import Image

from anomalib_metarefine.features.extract import image_tensor
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE, no_pretrained_weights
from anomalib_metarefine.images.reading import read_image
from anomalib_metarefine.model.calibration import calibrate_checkpoint, calibrate_model, raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.export import export_model, sidecar_of
from anomalib_metarefine.model.graph import Graph
from anomalib_metarefine.model.ignoring import ignore_regions
from anomalib_metarefine.model.post_processor import score_scales
from tests.conftest import plate

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plates")
    for i in range(24):
        plate(2 + i).save(folder / f"{i:02d}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def patchcore(plates):
    """It remembers twelve plates, and has its threshold from all 24."""
    torch.manual_seed(0)
    model = Patchcore(
        backbone=OFFLINE_BACKBONE, layers=["blocks.1", "blocks.2"], pre_trained=False, visualizer=False,
        pre_processor=Patchcore.configure_pre_processor((64, 64)), evaluator=False,
    )  # fmt: skip
    model.model.train()
    model.model.feature_extractor.eval()
    images = torch.stack([image_tensor(path) for path in plates[:12]])
    model.model(model.pre_processor.transform(images))
    model.model.subsample_embedding(0.05)
    calibrate_model(model.eval(), plates)
    return model


@pytest.fixture(scope="module")
def patchcore_file(patchcore, tmp_path_factory):
    return export_model(patchcore, tmp_path_factory.mktemp("export"))


@pytest.fixture(params=["patchcore", "metarefine"])
def exported(request):
    """A model and its OpenVINO file."""
    if request.param == "metarefine":
        model, folder, _ = request.getfixturevalue("trained")
        return model, folder / "model.xml"
    return request.getfixturevalue("patchcore"), request.getfixturevalue("patchcore_file")


def assert_same_scores(model, graph, image, sizes, folder):
    scale = score_scales(model.post_processor)[0]
    for size in sizes:
        path = folder / f"{size[0]}x{size[1]}.png"
        Image.open(image).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
        found = graph.scores(read_image(path).pixels).image
        raw = (found - 0.5) * (scale["maximum"] - scale["minimum"]) + scale["threshold"]
        assert raw == pytest.approx(raw_scores(model, [path]).image.item(), rel=1e-3)


def test_patchcore_takes_one_image_of_any_size(patchcore, patchcore_file, plates, tmp_path):
    """anomalib's export takes batches of two only: it traces the model on two images."""
    graph = Graph(patchcore_file)
    assert graph.accepts is None
    assert_same_scores(patchcore, graph, plates[3], [(96, 96), (130, 50)], tmp_path)


@pytest.mark.slow
def test_patchcore_takes_one_image_of_one_size(patchcore, plates, tmp_path):
    graph = Graph(export_model(patchcore, tmp_path, "onnx", input_size=(96, 96)))
    assert graph.accepts == (96, 96)
    assert_same_scores(patchcore, graph, plates[3], [(96, 96)], tmp_path)


def clamped(model, path):
    """The score in [0, 1] of an image that is resized as in training."""
    scale = score_scales(model.post_processor)[0]
    raw = raw_scores(model, [path]).image.item()
    return np.clip((raw - scale["threshold"]) / (scale["maximum"] - scale["minimum"]) + 0.5, 0, 1)


def test_inferencers_of_anomalib(exported, plates, tmp_path, monkeypatch):
    model, file = exported
    monkeypatch.chdir(tmp_path)  # the inferencer writes a cache folder into the working directory
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    pickled = export_model(model, tmp_path, "torch")
    expected = clamped(model, plates[5])
    for found in (
        OpenVINOInferencer(file, device="CPU", config=EXACT).predict(plates[5]),
        TorchInferencer(pickled, device="cpu").predict(plates[5]),
    ):
        assert found.pred_score.item() == pytest.approx(expected, abs=1e-3)
        assert bool(found.pred_label.item()) == (expected > 0.5)


def test_model_api_of_intel(exported, plates):
    """It gives the pixels of a file to the graph as they are, and returns what the graph says."""
    models = pytest.importorskip(
        "model_api.models", reason="needs openvino-model-api, which brings an OpenCV of its own"
    )
    adapters = pytest.importorskip("model_api.adapters")
    model, file = exported
    adapter = adapters.OpenvinoAdapter(ov.Core(), str(file), device="CPU", plugin_config=EXACT)
    detector = models.AnomalyDetection(adapter, {}, preload=True)
    found = detector(np.asarray(Image.open(plates[5]).convert("RGB")))
    expected = clamped(model, plates[5])
    assert found.pred_score == pytest.approx(expected, abs=1e-3)
    assert found.anomaly_map.shape == (96, 96)
    assert found.pred_label == str(expected > 0.5)


@pytest.fixture
def left_third(tmp_path):
    picture = np.repeat([[0] * 32 + [255] * 64], 96, axis=0).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "ignore.png")
    return tmp_path / "ignore.png"


@pytest.fixture
def stfpm():
    torch.manual_seed(0)
    with no_pretrained_weights():
        model = Stfpm(visualizer=False, evaluator=False, pre_processor=Stfpm.configure_pre_processor((64, 64)))
    return model.eval()


def test_regions_are_left_out_of_a_model_whose_score_is_the_highest_of_its_map(stfpm, plates, left_third, tmp_path):
    content = {"state_dict": stfpm.state_dict(), "hyper_parameters": dict(stfpm.hparams)}
    stfpm.on_save_checkpoint(content)
    torch.save({"pytorch-lightning_version": "2.6.0", **content}, tmp_path / "model.ckpt")
    calibrate_checkpoint(tmp_path / "model.ckpt", tmp_path / "new.ckpt", plates, model="Stfpm", ignore=left_third)
    ignoring = load_checkpoint(tmp_path / "new.ckpt")
    with torch.no_grad():
        image = stfpm.pre_processor.transform(image_tensor(plates[5]).unsqueeze(0))
        before, found = stfpm.model(image), ignoring.model(image)
    kept = found.anomaly_map[..., 22:]  # a pixel is ignored where half of it is
    torch.testing.assert_close(kept, before.anomaly_map[..., 22:])
    assert found.pred_score.item() == kept.max()
    assert (found.anomaly_map[..., :21] == before.anomaly_map.min()).all()
    assert sidecar_of(ignoring, "openvino", "FP32", None).training["ignored"][0] == "#####..........."


@pytest.mark.slow
def test_the_graph_leaves_regions_out_too(stfpm, plates, left_third, tmp_path):
    ignore_regions(stfpm, left_third, plates)
    calibrate_model(stfpm, plates)
    assert_same_scores(stfpm, Graph(export_model(stfpm, tmp_path)), plates[5], [(96, 96)], tmp_path)


def test_regions_are_refused_where_nobody_knows_what_the_score_owes_to_them(patchcore, trained, plates, left_third):
    with pytest.raises(ValueError, match="can't be left out of Patchcore: its image score is not the highest"):
        ignore_regions(patchcore, left_third, plates)
    with pytest.raises(ValueError, match="MetaRefine leaves regions out of its training, too. Train it with them"):
        ignore_regions(trained.model, left_third, plates)
    with pytest.raises(ValueError, match="To leave regions out of Patchcore, .* Pass them"):
        ignore_regions(patchcore, left_third, [])
