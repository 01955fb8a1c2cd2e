"""8 bits for the backbone of an exported MetaRefine, and for nothing else in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from anomalib_metarefine.features.extract import image_tensor
from anomalib_metarefine.features.resize import ExactResize
from anomalib_metarefine.logs import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    import openvino as ov
    from anomalib.data import AnomalibDataModule

    from anomalib_metarefine.refinement.rounds import Refinement

_CALIBRATION_IMAGES = 300  # what NNCF recommends
_STEM = 3  # convolutions; quantising the first costs 1.7 points of image AUROC on ELPV mono, all after these nothing


def quantize(network: ov.Model, images: Sequence[str | Path]) -> ov.Model:
    """Quantise the backbone of MetaRefine's graph to 8 bits.

    Whitening and flow stay in floating point, since they amplify small differences between features on purpose, and
    so do the first convolutions, which would lose small differences between pixels.

    Args:
        network (ov.Model): The exported graph, in FP32.
        images (Sequence[str | Path]): To choose the ranges of 8 bits by; see `calibration_images`.

    Raises:
        ModuleNotFoundError: If NNCF is missing.
    """
    try:
        import nncf
    except ModuleNotFoundError as error:
        msg = "INT8 needs NNCF. Install it: pip install 'anomalib-metarefine[int8]'."
        raise ModuleNotFoundError(msg, name="nncf") from error

    rows, columns = network.input(0).get_partial_shape()[2:]
    resize = ExactResize((rows.get_length(), columns.get_length())) if rows.is_static else nn.Identity()
    with quiet("nncf"):  # a line for every operation otherwise
        return nncf.quantize(
            network,
            nncf.Dataset(images, lambda path: resize(image_tensor(path)).unsqueeze(0).numpy()),
            ignored_scope=nncf.IgnoredScope(names=_kept_in_float(network)),
            subset_size=len(images),
        )


def calibration_images(refinement: Refinement | None, datamodule: AnomalibDataModule | None) -> list[str]:
    """Paths of up to 300 kept training images, spread evenly over their names.

    Args:
        refinement (Refinement | None): What was decided about the training images.
        datamodule (AnomalibDataModule | None): Where they are now; ``None`` looks where they were in training.

    Raises:
        ValueError: If none of them is there.
    """
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
    readers = [target.get_node() for target in root.output(0).get_target_inputs()]
    whitened = next(reader for reader in readers if reader.get_type_name() == "MatMul")  # variants are picked, too
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
