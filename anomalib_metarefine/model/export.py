"""What MetaRefine adds to anomalib's export: a lean post-processor, quantisation of the backbone alone, the sidecar."""

from __future__ import annotations

import importlib.metadata
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils import read_image
from anomalib.post_processing import PostProcessor
from torch import nn
from torchvision.transforms.v2 import Compose, Resize

from anomalib_metarefine.curation.manifest import data_sha256
from anomalib_metarefine.deploy.sidecar import Sidecar, file_hash, write_sidecar
from anomalib_metarefine.features.resize import ExactResize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import openvino as ov
    from anomalib.data import AnomalibDataModule

    from anomalib_metarefine.model.lightning_model import MetaRefine
    from anomalib_metarefine.refinement.rounds import Refinement

_CALIBRATION_IMAGES = 300  # what NNCF recommends
_STEM = 3  # convolutions; quantising the first costs 1.7 points of image AUROC on ELPV mono, all after these nothing
_PACKAGES = ("anomalib-metarefine", "anomalib", "torch", "openvino", "nncf", "onnx", "timm")


class FrozenPostProcessor(nn.Module):
    """anomalib's post-processing of a finished model: one scale, one shift and one comparison for each output.

    anomalib's own decides about missing thresholds and empty ranges inside of the graph, which costs ten operations on
    every pixel. Here it is decided once.

    Args:
        post_processor (PostProcessor): With its thresholds and ranges.
    """

    def __init__(self, post_processor: PostProcessor) -> None:
        super().__init__()
        self.thresholding = post_processor.enable_thresholding
        self.normalizing = post_processor.enable_normalization
        self.image, self.pixel = score_scales(post_processor)
        self.image_limit = float(post_processor.normalized_image_threshold)
        self.pixel_limit = float(post_processor.normalized_pixel_threshold)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalised scores ``[B]`` and maps ``[B x 1 x H x W]`` in [0, 1], labels and masks."""
        score = self._normalize(predictions.pred_score, self.image)
        anomaly_map = self._normalize(predictions.anomaly_map, self.pixel)
        label = score > self.image_limit if self.thresholding else None
        mask = anomaly_map > self.pixel_limit if self.thresholding else None
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    def _normalize(self, values: torch.Tensor, scale: dict[str, float]) -> torch.Tensor:
        span = scale["maximum"] - scale["minimum"]
        if not self.normalizing or np.isnan(span):
            return values
        if span == 0:  # all validation images had one score: anomalib then tells only above from below
            return 0.5 + 0.5 * torch.sign(values - scale["threshold"])
        return ((values - scale["threshold"]) / span + 0.5).clamp(0, 1)


def score_scales(post_processor: PostProcessor) -> tuple[dict[str, float], dict[str, float]]:
    """Raw threshold, minimum and maximum of image scores and of anomaly maps, as anomalib takes them.

    Where there is no threshold, it takes the middle between minimum and maximum. NaN where a model was never validated.
    """
    scales = []
    for kind in ("image", "pixel"):
        low, high, threshold = (
            getattr(post_processor, f"{kind}_{name}").item() for name in ("min", "max", "threshold")
        )
        threshold = (low + high) / 2 if np.isnan(threshold) else threshold
        scales.append({"threshold": threshold, "minimum": low, "maximum": high})
    return scales[0], scales[1]


@contextmanager
def exportable(model: MetaRefine) -> Iterator[None]:
    """A model as it is exported: with its post-processor frozen, if it is anomalib's own."""
    post_processor = model.post_processor
    if type(post_processor) is PostProcessor:
        model.post_processor = FrozenPostProcessor(post_processor)
    try:
        yield
    finally:
        model.post_processor = post_processor


def describe(model: MetaRefine, path: Path, kind: str, precision: str, input_size: tuple[int, int] | None) -> Path:
    """Write ``metadata.json`` beside an exported model.

    Args:
        model (MetaRefine): That was exported.
        path (Path): The ``.xml``, ``.onnx`` or ``.pt`` file.
        kind (str): ``"openvino"``, ``"onnx"`` or ``"torch"``.
        precision (str): ``"FP32"``, ``"FP16"`` or ``"INT8"``.
        input_size (tuple[int, int] | None): Height and width of the images that the graph accepts; ``None`` means any.

    Returns:
        Path: Of the metadata.
    """
    has_scales = isinstance(model.post_processor, PostProcessor)
    image_score, anomaly_map = score_scales(model.post_processor) if has_scales else ({}, {})
    for scale, name in ((image_score, "image"), (anomaly_map, "pixel")):
        if scale:
            scale["normalized_threshold"] = float(getattr(model.post_processor, f"normalized_{name}_threshold"))
    refinement = model.refinement
    sidecar = Sidecar(
        model={"name": type(model).__name__, "format": kind, "precision": precision},
        files={file.name: file_hash(file) for file in sorted(path.parent.glob(f"{path.stem}.*"))},
        input={
            "name": "input",
            "layout": "NCHW",
            "colour_order": "RGB",
            "value_range": [0.0, 1.0],
            "size": _resized_to(model),
            "accepts": list(input_size) if input_size else "any",
        },
        image_score=image_score,
        anomaly_map=anomaly_map,
        calibration=_calibration_in_force(model),
        training={
            "images": len(refinement.kept) if refinement else None,
            "kept": sum(refinement.kept) if refinement else None,
            **model.provenance,
        },
        versions=_versions(),
    )
    return write_sidecar(path.parent, sidecar)


def data_hashes(refinement: Refinement, hashes: Mapping[str, str]) -> dict[str, str | None]:
    """One hash of the contents of all training images, and one of what was decided about each.

    Neither depends on where the files lie, on their names or on their order.

    Args:
        refinement (Refinement): Of the model.
        hashes (Mapping[str, str]): SHA-256 of the images, by path; ``{}`` where no datamodule told the paths.
    """
    if not all(path in hashes for path in refinement.paths):
        return {"data_sha256": None, "manifest_sha256": None}
    contents = [hashes[path] for path in refinement.paths]
    decisions = ["keep" if kept else "reject" for kept in refinement.kept]
    return {"data_sha256": data_sha256(contents, contents), "manifest_sha256": data_sha256(contents, decisions)}


def _calibration_in_force(model: MetaRefine) -> dict[str, Any] | None:
    """How the threshold in the graph was chosen; ``None`` if by a validation since."""
    calibration, post_processor = model.calibration, model.post_processor
    if calibration is None or not isinstance(post_processor, PostProcessor):
        return None
    return calibration if np.isclose(calibration["threshold"], post_processor.image_threshold.item()) else None


def _resized_to(model: MetaRefine) -> list[int] | None:
    transform = getattr(model.pre_processor, "transform", None)
    parts = transform.transforms if isinstance(transform, Compose) else [transform]
    sizes = [list(part.size) for part in parts if isinstance(part, Resize)]
    return sizes[0] if sizes else None


def _versions() -> dict[str, str | None]:
    return {name.replace("-", "_"): _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def quantize(model: MetaRefine, network: ov.Model, datamodule: AnomalibDataModule | None) -> ov.Model:
    """Quantise the backbone to 8 bits, calibrated on training images that refinement kept.

    Whitening and flow stay in floating point, since they amplify small differences between features on purpose, and
    so do the first convolutions, which would lose small differences between pixels.

    Args:
        model (MetaRefine): The model behind the network.
        network (ov.Model): Its exported graph, in FP32.
        datamodule (AnomalibDataModule | None): Where the training images are; ``None`` reads them from the paths they
            had in training.

    Raises:
        ModuleNotFoundError: If NNCF is missing.
        ValueError: If there is no image to calibrate on.
    """
    try:
        import nncf
    except ModuleNotFoundError as error:
        msg = "INT8 needs NNCF. Install it: pip install 'anomalib-metarefine[int8]'."
        raise ModuleNotFoundError(msg, name="nncf") from error

    images = calibration_images(model, datamodule)
    rows, columns = network.input(0).get_partial_shape()[2:]
    resize = ExactResize((rows.get_length(), columns.get_length())) if rows.is_static else nn.Identity()
    with _quiet("nncf"):  # a line for every operation otherwise
        return nncf.quantize(
            network,
            nncf.Dataset(images, lambda path: resize(read_image(path, as_tensor=True)).unsqueeze(0).numpy()),
            ignored_scope=nncf.IgnoredScope(names=_kept_in_float(network)),
            subset_size=len(images),
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def calibration_images(model: MetaRefine, datamodule: AnomalibDataModule | None) -> list[str]:
    """Paths of up to 300 kept training images, spread evenly over their names.

    Raises:
        ValueError: If none of them is there.
    """
    refinement = model.refinement
    if datamodule is not None:
        datamodule.setup("fit")
        rejected = set(refinement.rejected) if refinement else set()
        paths = sorted(set(map(str, datamodule.train_data.samples.image_path)) - rejected)
    elif refinement is not None:
        paths = [path for path, kept in zip(refinement.paths, refinement.kept, strict=True) if kept]
    else:
        paths = []
    paths = [path for path in paths if Path(path).is_file()]
    if not paths:
        where = f" (the first was {refinement.paths[0]})" if refinement else ""
        msg = f"INT8 needs training images to calibrate on, and none is where it was in training{where}. Pass --data."
        raise ValueError(msg)
    picks = np.linspace(0, len(paths) - 1, min(_CALIBRATION_IMAGES, len(paths))).round().astype(int)
    return [paths[i] for i in picks]


def _kept_in_float(network: ov.Model) -> list[str]:
    """Names of the operations outside of the backbone, and of its stem."""
    name = "model.scorer.root_0"
    operations = network.get_ordered_ops()
    root = next((node for node in operations if node.get_friendly_name() == name), None)
    if root is None:
        msg = f"The exported graph has no constant {name!r}; without it, the backbone can't be told from the rest."
        raise RuntimeError(msg)
    whitened = next(iter(root.output(0).get_target_inputs())).get_node()
    node = whitened.input_value(0).get_node()
    while node.get_type_name() != "MatMul":  # up to the projection, past slices, transposes and a subtraction
        node = node.input_value(0).get_node()
    convolutions = [node for node in operations if node.get_type_name().endswith("Convolution")][:_STEM]
    stem = _upstream(convolutions[-1]) if convolutions else set()  # and the resize before it
    quantized = _upstream(node.input_value(0).get_node()) - stem
    return [node.get_friendly_name() for node in operations if node.get_friendly_name() not in quantized]


def _upstream(node: ov.Node) -> set[str]:
    """Names of an operation and of all that it depends on."""
    names, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in names:
            names.add(node.get_friendly_name())
            waiting.extend(value.get_node() for value in node.input_values())
    return names
