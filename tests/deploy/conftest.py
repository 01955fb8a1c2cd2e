"""Deployed models: a small graph whose scores are known."""

from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import openvino.opset13 as ops
import pytest
from PIL import Image

from anomalib_metarefine.deploy.sidecar import Sidecar, write_sidecar
from anomalib_metarefine.images.reading import file_hash

RAW = {"threshold": 10.0, "minimum": 0.0, "maximum": 20.0, "normalized_threshold": 0.5}


def brightness_model(folder: Path, accepts="any", quantiles=None, band=None, sidecar=True) -> Path:
    """A graph with the names of an exported one: an image's score is its mean brightness, raw it is 20 times that."""
    folder.mkdir(parents=True, exist_ok=True)
    image = ops.parameter([-1, 3, *(accepts if accepts != "any" else (-1, -1))], np.float32, name="input")
    score = ops.reduce_mean(image, np.array([1, 2, 3]), keep_dims=False)
    scores = ops.reduce_mean(image, np.array([1]), keep_dims=True)
    half = np.float32(0.5)
    outputs = {"pred_score": ops.clamp(score, 0.0, 1.0), "anomaly_map": ops.clamp(scores, 0.0, 1.0)}
    outputs |= {"pred_label": ops.greater(score, half), "pred_mask": ops.greater(scores, half)}
    for name, node in outputs.items():
        node.output(0).set_names({name})
    image.output(0).set_names({"input"})
    ov.save_model(ov.Model(list(outputs.values()), [image], "brightness"), folder / "model.xml", compress_to_fp16=False)
    if sidecar:
        describe(folder, ("model.xml", "model.bin"), accepts, quantiles, band)
    return folder


def brightness_onnx(folder: Path) -> Path:
    """The same, as ONNX."""
    value, of = onnx.helper.make_tensor_value_info, onnx.TensorProto
    nodes = [
        ("ReduceMean", ["input", "all"], ["mean"], {"keepdims": 0}),
        ("Clip", ["mean", "zero", "one"], ["pred_score"], {}),
        ("Greater", ["mean", "half"], ["pred_label"], {}),
        ("ReduceMean", ["input", "colours"], ["anomaly_map"], {"keepdims": 1}),
    ]
    constants = {"all": np.array([1, 2, 3]), "colours": np.array([1])}
    constants |= {"zero": np.float32(0), "one": np.float32(1), "half": np.float32(0.5)}
    outputs = [
        value("pred_score", onnx.TensorProto.FLOAT, ["batch"]),
        value("pred_label", onnx.TensorProto.BOOL, ["batch"]),
    ]
    outputs.append(value("anomaly_map", onnx.TensorProto.FLOAT, ["batch", 1, "height", "width"]))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, inputs, results, **settings) for kind, inputs, results, settings in nodes],
        "brightness",
        [value("input", of.FLOAT, ["batch", 3, "height", "width"])],
        outputs,
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), folder / "model.onnx")
    describe(folder, ("model.onnx",), "any", None, None)
    return folder


def describe(folder: Path, files, accepts, quantiles, band) -> None:
    """Write ``metadata.json``."""
    calibration = None
    if quantiles is not None:
        calibration = {"quantiles": list(quantiles), "images": 1000, "set_aside": 0, "false_alarm_rate": 0.01}
        calibration["uncertain"] = {"lower": band[0], "upper": band[1], "expected_share": 0.02} if band else None
    sidecar = Sidecar(
        model={"name": "brightness", "format": "onnx" if "model.onnx" in files else "openvino", "precision": "FP32"},
        files={name: file_hash(folder / name) for name in files},
        input={"name": "input", "accepts": accepts},
        image_score=RAW,
        anomaly_map=RAW,
        calibration=calibration,
    )
    write_sidecar(folder, sidecar)


def grey(level: float, size: tuple[int, int] = (24, 32), seed: int = 0) -> np.ndarray:
    """A noisy image of a mean brightness."""
    noise = np.random.default_rng(seed).normal(0, 5, (*size, 3))
    return (level + noise - noise.mean()).round().clip(0, 255).astype(np.uint8)


def pixels(level: float, size: tuple[int, int] = (24, 32), seed: int = 0) -> np.ndarray:
    """The same as the detector takes it."""
    return grey(level, size, seed) / np.float32(255)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def brightness(tmp_path):
    """Calibrated on raw scores from 6 to 8; uncertain from 9.5 to 10.5."""
    return brightness_model(tmp_path / "model", quantiles=np.linspace(6, 8, 101), band=(9.5, 10.5))
