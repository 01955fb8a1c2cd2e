"""What we add to anomalib's export, for any model: the exact resize, a lean post-processor, the sidecar."""

from __future__ import annotations

import importlib.metadata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize

from anomalib_metarefine.deploy.sidecar import Sidecar, write_sidecar
from anomalib_metarefine.features.resize import exact_export_transform
from anomalib_metarefine.images.hashes import data_sha256
from anomalib_metarefine.images.reading import file_hash
from anomalib_metarefine.logs import quiet
from anomalib_metarefine.model.graph import takes_one_image
from anomalib_metarefine.model.post_processor import FrozenPostProcessor, score_scales
from anomalib_metarefine.model.quantization import calibration_images, quantize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import openvino
    from anomalib.data import AnomalibDataModule
    from anomalib.deploy.export import CompressionType

    from anomalib_metarefine.refinement.rounds import Refinement

# The opset is the one that torch's exporter writes natively: anomalib asks for 14, the exporter knows 18 and up, and
# fails to convert the finished graph down.
ONNX_SETTINGS = {"opset_version": 18, "verbose": False}
_FREE_SIZES = {2: "height", 3: "width"}  # axes of an image of any size, in a batch of one
_PACKAGES = ("anomalib-metarefine", "anomalib", "torch", "openvino", "nncf", "onnx", "timm")


@contextmanager
def exportable(model: AnomalibModule, exact_resize: bool = True) -> Iterator[None]:
    """A model as it is exported: anomalib's post-processor frozen, and the resize that of the training.

    Exporters stay silent meanwhile: they log a line for every operation that they look at.

    Args:
        model (AnomalibModule): As it was, afterwards.
        exact_resize (bool): ``False`` leaves the resize to anomalib, whose exports don't antialias.
    """
    post_processor, pre_processor = model.post_processor, model.pre_processor
    if isinstance(post_processor, FrozenPostProcessor):  # one export calls another: OpenVINO goes through ONNX
        yield
        return
    transform = getattr(pre_processor, "export_transform", None)
    if type(post_processor) is PostProcessor:
        model.post_processor = FrozenPostProcessor(post_processor)
    if transform is not None:
        as_exported = exact_export_transform if exact_resize else get_exportable_transform
        pre_processor.export_transform = as_exported(pre_processor.transform)
    try:
        with quiet("onnx_ir", "onnxscript", "torch.onnx"):
            yield
    finally:
        model.post_processor = post_processor
        if transform is not None:
            pre_processor.export_transform = transform


def export_model(
    model: AnomalibModule,
    export_root: str | Path,
    kind: Literal["openvino", "onnx", "torch"] = "openvino",
    compression: CompressionType | None = None,
    input_size: tuple[int, int] | None = None,
    exact_resize: bool = True,
    datamodule: AnomalibDataModule | None = None,
) -> Path:
    """Export any model of anomalib so that it scores like the checkpoint, with ``metadata.json`` beside it.

    Args:
        model (AnomalibModule): A trained model.
        export_root (str | Path): The files go into ``weights/openvino`` (``onnx``, ``torch``) under it.
        kind (Literal["openvino", "onnx", "torch"]): Format.
        compression (CompressionType | None): Of OpenVINO files; ``None`` is FP32.
        input_size (tuple[int, int] | None): Height and width of the images that the graph accepts; ``None`` means any.
        exact_resize (bool): See `exportable`.
        datamodule (AnomalibDataModule | None): For 8 bits, where anomalib's own models are calibrated.

    Returns:
        Path: The model's file.

    Raises:
        ValueError: If a compression is asked for with another format than OpenVINO.
    """
    if compression and kind != "openvino":
        msg = f"{compression.name} is for OpenVINO files only, found {kind}. Leave one of the two out."
        raise ValueError(msg)

    def exported(onnx_settings: dict[str, Any]) -> Path:
        if kind == "torch":
            return AnomalibModule.to_torch(model, export_root)
        if kind == "onnx":
            return AnomalibModule.to_onnx(model, export_root, input_size=input_size, **onnx_settings)
        return AnomalibModule.to_openvino(
            model, export_root, input_size=input_size, compression_type=compression, datamodule=datamodule,
            onnx_kwargs=onnx_settings,
        )  # fmt: skip

    with exportable(model, exact_resize):
        path = exported(ONNX_SETTINGS)
        if kind != "torch" and not takes_one_image(path):
            # anomalib traces a model on two images, and what PatchCore does with them is fixed to two.
            path = exported(ONNX_SETTINGS | {"dynamic_axes": {} if input_size else {"input": _FREE_SIZES}})
    write_metadata(model, path, kind, precision_of(compression), input_size, exact_resize)
    return path


def precision_of(compression: CompressionType | None) -> str:
    """``"FP32"``, ``"FP16"`` or ``"INT8"``."""
    return compression.name.split("_")[0] if compression else "FP32"


def write_metadata(
    model: AnomalibModule,
    path: Path,
    kind: str,
    precision: str,
    input_size: tuple[int, int] | None,
    exact_resize: bool = True,
) -> Path:
    """Write ``metadata.json`` beside an exported model's file, and return its path; see `sidecar_of`."""
    sidecar = sidecar_of(model, kind, precision, input_size, exact_resize)
    sidecar.files = {file.name: file_hash(file) for file in sorted(path.parent.glob(f"{path.stem}.*"))}
    return write_sidecar(path.parent, sidecar)


def sidecar_of(
    model: AnomalibModule, kind: str, precision: str, input_size: tuple[int, int] | None, exact_resize: bool = True
) -> Sidecar:
    """What ``metadata.json`` of an exported model must say, but for the hashes of its files.

    Args:
        model (AnomalibModule): That was exported.
        kind (str): ``"openvino"``, ``"onnx"`` or ``"torch"``.
        precision (str): ``"FP32"``, ``"FP16"`` or ``"INT8"``.
        input_size (tuple[int, int] | None): Height and width of the images that the graph accepts; ``None`` means any.
        exact_resize (bool): Whether the graph resizes as the training does.
    """
    has_scales = isinstance(model.post_processor, PostProcessor)
    image_score, anomaly_map = score_scales(model.post_processor) if has_scales else ({}, {})
    for scale, name in ((image_score, "image"), (anomaly_map, "pixel")):
        if scale:
            scale["normalized_threshold"] = float(getattr(model.post_processor, f"normalized_{name}_threshold"))
    refinement = getattr(model, "refinement", None)
    return Sidecar(
        model={"name": type(model).__name__, "format": kind, "precision": precision},
        files={},
        input={
            "name": "input",
            "layout": "NCHW",
            "colour_order": "RGB",
            "value_range": [0.0, 1.0],
            "size": _resized_to(getattr(model.pre_processor, "transform", None)),
            "antialias": exact_resize and _begins_antialiased(getattr(model.pre_processor, "transform", None)),
            "accepts": list(input_size) if input_size else "any",
            "bit_depth": getattr(model, "bit_depth", None),
        },
        image_score=image_score,
        anomaly_map=anomaly_map,
        calibration=calibration_in_force(getattr(model, "calibration", None), model.post_processor),
        training={
            "images": len(refinement.kept) if refinement else None,
            "kept": sum(refinement.kept) if refinement else None,
            **getattr(model, "provenance", {}),
        },
        versions={name.replace("-", "_"): _version(name) for name in _PACKAGES},
    )


class VerifiableExport:
    """What MetaRefine puts in front of anomalib's export methods, so that `anomalib export` does as `export_model`."""

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Anomalib's export, with ``metadata.json`` beside it."""
        path = super().to_torch(export_root, model_file_name)
        write_metadata(self, path, "torch", "FP32", None)
        return path

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Anomalib's export as `ONNX_SETTINGS` have it, with ``metadata.json`` beside it."""
        with exportable(self):
            path = super().to_onnx(export_root, model_file_name, input_size, **ONNX_SETTINGS | kwargs)
        write_metadata(self, path, "onnx", "FP32", input_size)
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Anomalib's export, with ``metadata.json`` beside it; ``INT8_PTQ`` quantises the backbone alone."""
        path = super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)
        write_metadata(self, path, "openvino", precision_of(compression_type), input_size)
        return path

    def _post_training_quantization_ov(
        self, model: openvino.Model, datamodule: AnomalibDataModule | None = None
    ) -> openvino.Model:
        return quantize(model, calibration_images(self.refinement, datamodule))


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


def calibration_in_force(calibration: dict[str, Any] | None, post_processor: nn.Module | None) -> dict[str, Any] | None:
    """How the threshold in the graph was chosen; ``None`` if by a validation since."""
    if calibration is None or not isinstance(post_processor, PostProcessor):
        return None
    return calibration if np.isclose(calibration["threshold"], post_processor.image_threshold.item()) else None


def _resized_to(transform: nn.Module | None) -> list[int] | None:
    parts = transform.transforms if isinstance(transform, Compose) else [transform]
    sizes = [list(part.size) for part in parts if isinstance(part, Resize)]
    return sizes[0] if sizes else None


def _begins_antialiased(transform: nn.Module | None) -> bool:
    """Whether images may as well be resized before the graph: first an antialiased bilinear resize, and no other."""
    parts = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    first, *rest = parts or [None]
    return (
        isinstance(first, Resize)
        and first.antialias is True
        and first.interpolation in ("bilinear", InterpolationMode.BILINEAR)
        and len(first.size or ()) == 2
        and not any(isinstance(part, Resize) for part in rest)
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
