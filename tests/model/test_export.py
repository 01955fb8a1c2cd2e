"""Exported models score like the checkpoint: torch, ONNX and OpenVINO in FP32, FP16 and INT8, on real images."""

import dataclasses
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import InferenceBatch, MVTecAD
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.deploy.export import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.models.components.base.export_mixin.mixin import ExportMixin, create_export_root
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from PIL import Image
from sklearn.metrics import roc_auc_score

from anomalib_metarefine import ELPV, MetaRefine
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.sidecar import read_sidecar, verify_files
from anomalib_metarefine.images.reading import read_image
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.graph import Graph
from anomalib_metarefine.model.post_processor import FrozenPostProcessor
from anomalib_metarefine.model.quantization import calibration_images

# On processors with bfloat16 OpenVINO computes in it unless told otherwise; see docs/deployment.md.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


class Exported(NamedTuple):
    """A trained model, and its exports by kind."""

    model: MetaRefine
    paths: dict[str, Path]


def export_all(datamodule, root: Path) -> Exported:
    """Train with default settings, and export in all ways."""
    seed_everything(0, verbose=False)
    engine = Engine(default_root_dir=root, logger=False, accelerator="cpu", limit_val_batches=1)
    engine.fit(MetaRefine(visualizer=False), datamodule=datamodule)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    settings = {
        "torch": {"export_type": "torch"},
        "onnx": {"export_type": "onnx"},
        "FP32": {"export_type": "openvino"},
        "fixed": {"export_type": "openvino", "input_size": (256, 256)},
        "FP16": {"export_type": "openvino", "compression_type": CompressionType.FP16},
        "INT8": {"export_type": "openvino", "compression_type": CompressionType.INT8_PTQ},
    }
    with each_graph_traced_once():
        paths = {
            kind: Engine(accelerator="cpu").export(MetaRefine(), export_root=root / kind, ckpt_path=checkpoint, **set_)
            for kind, set_ in settings.items()
        }
    return Exported(load_checkpoint(checkpoint), paths)


@contextmanager
def each_graph_traced_once():
    """All precisions begin with the same ONNX file, and torch's exporter takes a quarter of a minute to make it."""
    made, to_onnx = {}, ExportMixin.to_onnx

    def once(model, export_root, model_file_name="model", input_size=None, **settings):
        if input_size not in made:
            made[input_size] = to_onnx(model, export_root, model_file_name, input_size, **settings)
            return made[input_size]
        folder = create_export_root(export_root, ExportType.ONNX)
        shutil.copytree(made[input_size].parent, folder, dirs_exist_ok=True)
        return folder / made[input_size].name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportMixin, "to_onnx", once)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    """Trained on 40 real solar cells."""
    return export_all(ELPV(train_images=40), tmp_path_factory.mktemp("export"))


def cells() -> list[Path]:
    samples = make_elpv_samples(packaged_root(), "mono")
    return [Path(path) for path in samples.image_path[samples.label_index >= 0]]


def real_images(files: list[Path], count: int, size: tuple[int, int] | None) -> list[np.ndarray]:
    """Some of them, as graphs take them: ``[1, 3, H, W]`` in [0, 1]; every second one in colour."""
    images = []
    for i, path in enumerate(files[:: len(files) // count][:count]):
        image = Image.open(path).convert("RGB")
        pixels = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC) if size else image, dtype=np.float32)
        if i % 2:
            pixels *= np.array([1.0, 0.85, 0.7], dtype=np.float32)  # the tint of a lamp
        images.append((pixels / 255).transpose(2, 0, 1)[None])
    return images


def expected(model: MetaRefine, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Score and map as in anomalib's testing."""
    post = model.post_processor
    with torch.no_grad():
        raw = model.model(model.pre_processor.transform(torch.from_numpy(image)))
    score = post._normalize(raw.pred_score, post.image_min, post.image_max, post.image_threshold)
    anomaly_map = post._normalize(raw.anomaly_map, post.pixel_min, post.pixel_max, post.pixel_threshold)
    return score.item(), anomaly_map.numpy()


def assert_parity(exported: Exported, images: list[np.ndarray], kinds=("torch", "onnx", "FP32", "FP16")) -> None:
    model, paths = exported
    core = ov.Core()
    networks = {kind: core.compile_model(paths[kind], "CPU", EXACT) for kind in kinds if kind != "torch"}
    frozen = torch.load(paths["torch"], weights_only=False)["model"].eval()
    for image in images:
        score, anomaly_map = expected(model, image)
        answers = {kind: network(image) for kind, network in networks.items()}
        if "torch" in kinds:
            with torch.no_grad():
                answers["torch"] = {
                    name: value.numpy() for name, value in frozen(torch.from_numpy(image))._asdict().items()
                }
        for kind, answer in answers.items():
            tolerance = 1e-2 if kind == "FP16" else 1e-3
            found = answer["pred_score"].item()
            raw = read_sidecar(paths[kind].parent).raw_score  # near 0, "relative" means nothing for normalised scores
            assert raw(found) == pytest.approx(raw(score), rel=tolerance)
            np.testing.assert_allclose(answer["anomaly_map"], anomaly_map, rtol=tolerance, atol=tolerance)
            if abs(score - 0.5) > tolerance:
                assert bool(answer["pred_label"].item()) == (score > 0.5)


SIZES = [((256, 256), 30), (None, 10), ((512, 512), 5), ((1024, 1024), 3), ((200, 640), 5)]


@pytest.mark.parametrize(("size", "count"), SIZES)
def test_scores_agree_at_every_size(exported, size, count):
    assert_parity(exported, real_images(cells(), count, size))


def test_a_graph_of_fixed_size(exported):
    assert_parity(exported, real_images(cells(), 10, (256, 256)), kinds=("fixed",))


@pytest.fixture(scope="module")
def screws(tmp_path_factory) -> Exported:
    """Trained on the screws of MVTec AD."""
    if "MVTEC_AD" not in os.environ:
        pytest.skip("needs MVTEC_AD, the folder of that data set")
    datamodule = MVTecAD(root=os.environ["MVTEC_AD"], category="screw", num_workers=0)
    return export_all(datamodule, tmp_path_factory.mktemp("screw"))


def screw_images() -> list[Path]:
    return sorted((Path(os.environ["MVTEC_AD"]) / "screw" / "test").rglob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (1024, 1024), (300, 700)])
def test_screws(screws, size):
    assert_parity(screws, real_images(screw_images(), 20, size))


@pytest.mark.slow
def test_int8_ranks_screws_alike(screws):
    files = screw_images()
    assert_int8_ranks_alike(screws, files, [path.parent.name != "good" for path in files])


def assert_int8_ranks_alike(exported: Exported, files: list[Path], anomalous: list[bool]) -> None:
    network = ov.Core().compile_model(exported.paths["INT8"], "CPU", EXACT)
    images = [real_images([path], 1, None)[0] for path in files]
    scores = [network(image)["pred_score"].item() for image in images]
    before = roc_auc_score(anomalous, [expected(exported.model, image)[0] for image in images])
    assert roc_auc_score(anomalous, scores) >= before - 0.005


def test_int8_ranks_alike(exported):
    samples = make_elpv_samples(packaged_root(), "mono")
    samples = samples[samples.label_index >= 0].sample(150, random_state=0)
    assert_int8_ranks_alike(exported, [Path(path) for path in samples.image_path], list(samples.label_index == 1))


def test_int8_quantizes_the_backbone_alone(exported):
    network = ov.Core().read_model(exported.paths["INT8"])
    quantized = {
        node.get_friendly_name()
        for fake in network.get_ops()
        if fake.get_type_name() == "FakeQuantize"
        for target in fake.output(0).get_target_inputs()
        for node in [target.get_node()]
    }
    kinds = {node.get_type_name() for node in network.get_ops() if node.get_friendly_name() in quantized}
    assert any(kind.endswith("Convolution") for kind in kinds)
    assert "MatMul" not in kinds


def test_int8_says_what_it_lacks(exported):
    elsewhere = dataclasses.replace(exported.model.refinement, paths=["/nowhere/a.png"], kept=[True], scores=[0.0])
    with pytest.raises(ValueError, match=r"none is where it was in training .*Pass --data"):
        calibration_images(elsewhere, None)


def test_int8_is_calibrated_on_kept_images(exported):
    refinement = exported.model.refinement
    kept = [i % 4 != 0 for i in range(len(refinement.paths))]
    refinement = dataclasses.replace(refinement, kept=kept)
    chosen = [path for path, keep in zip(refinement.paths, kept, strict=True) if keep]
    assert calibration_images(refinement, None) == chosen
    assert calibration_images(refinement, ELPV(train_images=40)) == sorted(chosen)


@pytest.mark.parametrize("kind", ["FP32", "fixed"])
def test_batches_of_any_length(exported, kind):
    network = ov.Core().compile_model(exported.paths[kind], "CPU", EXACT)
    images = np.concatenate(real_images(cells(), 3, (256, 256)))
    together = network(images)
    assert together["anomaly_map"].shape == (3, 1, 256, 256)
    alone = [network(images[i : i + 1])["pred_score"].item() for i in range(3)]
    np.testing.assert_allclose(together["pred_score"].ravel(), alone, rtol=1e-4)


@pytest.mark.parametrize("kind", ["onnx", "FP32", "fixed"])
def test_the_first_answer_is_right(exported, kind):
    """OpenVINO has answered wrongly the first time a graph with a branch ran."""
    (image,) = real_images(cells(), 1, (256, 256))
    network = ov.Core().compile_model(exported.paths[kind], "CPU", EXACT)
    first, second = (network(image)["anomaly_map"].copy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_inferencers_of_anomalib(exported, tmp_path, monkeypatch):
    paths = exported.paths
    monkeypatch.chdir(tmp_path)  # the inferencer writes a cache folder into the working directory
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = cells()[0]
    torch_ = TorchInferencer(paths["torch"], device="cpu").predict(path)
    for kind in ("onnx", "FP32"):
        openvino = OpenVINOInferencer(paths[kind], device="CPU", config=EXACT).predict(path)
        assert openvino.pred_score.item() == pytest.approx(torch_.pred_score.item(), rel=1e-3)
        assert bool(openvino.pred_label.item()) == bool(torch_.pred_label.item())


@pytest.mark.parametrize("kind", ["onnx", "FP32"])
def test_the_graph_is_opened_before_its_clamps(exported, kind):
    model, paths = exported
    scores = Graph(paths[kind]).scores(read_image(cells()[0]).pixels)
    post = model.post_processor
    for name, found, raw in zip(("image", "pixel"), scores, raw_scores(model, cells()[:1]), strict=False):
        low, high, at = (getattr(post, f"{name}_{part}").item() for part in ("min", "max", "threshold"))
        assert (found - 0.5) * (high - low) + at == pytest.approx(raw[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["onnx", "FP32", "FP16", "INT8", "fixed"])
def test_the_graph_itself_says_what_it_is(exported, kind):
    graph = Graph(exported.paths[kind])
    assert graph.precision == (kind if kind in ("FP16", "INT8") else "FP32")
    assert graph.accepts == ((256, 256) if kind == "fixed" else None)
    assert graph.open == (True, True)


@pytest.mark.parametrize("kind", ["torch", "onnx", "FP32", "FP16", "INT8", "fixed"])
def test_metadata(exported, kind):
    model, paths = exported
    sidecar = read_sidecar(paths[kind].parent)
    verify_files(paths[kind].parent, sidecar)
    assert paths[kind].name in sidecar.files
    assert sidecar.model["precision"] == (kind if kind in ("FP16", "INT8") else "FP32")
    assert sidecar.input["size"] == [256, 256]
    assert sidecar.input["accepts"] == ([256, 256] if kind == "fixed" else "any")
    assert sidecar.image_score["threshold"] == pytest.approx(model.post_processor.image_threshold.item())
    assert (sidecar.training["images"], sidecar.training["seed"]) == (40, 0)
    assert len(sidecar.training["data_sha256"]) == len(sidecar.training["manifest_sha256"]) == 64
    assert sidecar.versions["openvino"] == ov.__version__.split("-")[0]
    json.dumps(sidecar.training)


@pytest.mark.parametrize(
    "state",
    [
        {},  # never validated
        {"_image_threshold": 2.0, "image_min": 1.0, "image_max": 5.0, "pixel_min": 0.0, "pixel_max": 9.0},
        {"image_min": 1.0, "image_max": 5.0, "pixel_min": 0.0, "pixel_max": 9.0},
        {"_image_threshold": 2.0, "_pixel_threshold": 3.0, "image_min": 2.0, "image_max": 2.0},
    ],
)
@pytest.mark.parametrize("flags", [{}, {"enable_normalization": False}, {"enable_thresholding": False}])
def test_frozen_post_processor_equals_that_of_anomalib(state, flags):
    post_processor = PostProcessor(**flags, image_sensitivity=0.4)
    for name, value in state.items():
        getattr(post_processor, name).fill_(value)

    scores = torch.tensor([0.5, 1.0, 2.0, 3.0, 9.0])
    batch = InferenceBatch(pred_score=scores, anomaly_map=scores.view(5, 1, 1, 1).expand(5, 1, 2, 2))
    ours, theirs = FrozenPostProcessor(post_processor)(batch), post_processor(batch)
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        found, wanted = getattr(ours, name), getattr(theirs, name)
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)
