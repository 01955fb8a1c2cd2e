"""An exported graph opened up: what it really is, and its scores before it clamps them to [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import openvino as ov

if TYPE_CHECKING:
    from pathlib import Path

_PASSING = ("Convert", "Reshape", "Squeeze", "Unsqueeze", "Select")  # operations that leave values as they are
_EIGHT_BITS = (ov.Type.i8, ov.Type.u8)
_WEIGHTS = 1000  # numbers in a constant from which on it is taken for weights


class GraphScores(NamedTuple):
    """What a graph says about an image.

    Attributes:
        image (float): Normalised image score; not clamped if the graph's clamp was found.
        pixel (float): The same for the highest score in its map.
        anomalous (bool): Its label.
    """

    image: float
    pixel: float
    anomalous: bool


class Graph:
    """An exported model for any size of image, with the inputs of its clamps as outputs.

    Args:
        file (Path): The ``.xml`` or ``.onnx`` file.

    Attributes:
        precision (str): ``"INT8"`` if it quantises or holds weights of 8 bits, ``"FP16"`` if it holds weights of 16
            bits, else ``"FP32"``: from the graph itself, not from what stands beside it.
        accepts (tuple[int, int] | None): Height and width of images; ``None`` if any.
        open (tuple[bool, bool]): Whether the scores of image and map are had before they are clamped.
    """

    def __init__(self, file: Path) -> None:
        core = ov.Core()
        network = core.read_model(file)
        self.precision = _precision(network)
        rows, columns = network.input(0).partial_shape[2:]
        self.accepts = (rows.get_length(), columns.get_length()) if rows.is_static and columns.is_static else None
        before = [_before_clamp(network.output(name)) for name in ("pred_score", "anomaly_map")]
        self.open = tuple(found is not None for found in before)
        self._outputs = []
        for name, found in zip(("pred_score", "anomaly_map"), before, strict=True):
            output = network.output(name) if found is None else network.add_outputs(found)[0]
            output.get_tensor().add_names({f"{name}_before_clamp"})
            self._outputs.append(f"{name}_before_clamp")
        # As exactly as the device can: what differs by the device's habits is the detector's business.
        self._network = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def scores(self, image: np.ndarray) -> GraphScores:
        """Scores of an image ``[H, W, 3]`` of float32 in [0, 1]."""
        answer = self._network(image.transpose(2, 0, 1)[None])
        score, anomaly_map = (answer[name] for name in self._outputs)
        return GraphScores(float(score.max()), float(anomaly_map.max()), bool(answer["pred_label"].reshape(-1)[0]))


def takes_one_image(file: Path) -> bool:
    """Whether a graph takes batches of one."""
    batch = ov.Core().read_model(file).input(0).partial_shape[0]
    return bool(batch.is_dynamic or batch.get_length() == 1)


def _precision(network: ov.Model) -> str:
    operations = network.get_ops()
    weights = [node for node in operations if node.get_type_name() == "Constant" and _size(node) >= _WEIGHTS]
    types = {node.get_element_type() for node in weights}
    if any(node.get_type_name() == "FakeQuantize" for node in operations) or types & set(_EIGHT_BITS):
        return "INT8"
    return "FP16" if ov.Type.f16 in types else "FP32"


def _size(node: ov.Node) -> int:
    return int(np.prod(list(node.get_output_shape(0)), dtype=np.int64))


def _before_clamp(output: ov.Output) -> ov.Output | None:
    """What goes into the last clamp before an output; ``None`` if the values are not clamped there."""
    waiting = [output.get_node().input_value(0) if output.get_node().get_type_name() == "Result" else output]
    while waiting:
        value = waiting.pop(0)
        node = value.get_node()
        kind = node.get_type_name()
        if kind == "Clamp":
            return node.input_value(0)
        if kind in ("Minimum", "Maximum"):  # a clamp in two steps
            values = [source for source in node.input_values() if source.get_node().get_type_name() != "Constant"]
            inner = values[0].get_node() if len(values) == 1 else None
            if inner is None:
                continue
            if inner.get_type_name() in ("Minimum", "Maximum"):
                return next(v for v in inner.input_values() if v.get_node().get_type_name() != "Constant")
            return values[0]
        if kind in _PASSING:
            waiting += node.input_values()
    return None
