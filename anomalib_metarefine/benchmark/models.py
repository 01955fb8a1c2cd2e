"""Any anomalib model, on one backbone that all share, ready to be trained by anomalib's Engine."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from anomalib.models.components.filters import GaussianBlur2d

from anomalib_metarefine.benchmark.memo import MemoisedFeatures, frozen_networks
from anomalib_metarefine.benchmark.metrics import ScoreEvaluator
from anomalib_metarefine.benchmark.separable import SeparableBlur
from anomalib_metarefine.model.make import make_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anomalib.models.components import AnomalibModule

    from anomalib_metarefine.benchmark.memo import Memo


@dataclass(frozen=True)
class ModelSpec:
    """How a model is built and trained."""

    name: str  # its name in the table
    class_path: str  # its class: a name in anomalib.models, or a full path
    init_args: dict[str, Any] = field(default_factory=dict)  # arguments of the class that differ from its defaults
    batch_size: int = 32  # images of a training batch
    max_epochs: int | None = None  # passes over the training images, for models that don't know themselves when to stop
    # gradient steps, for the same. A cleaned training set is smaller, and is trained on less if epochs are counted
    max_steps: int | None = None

    @property
    def settings(self) -> str:
        """Everything but the name, as JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "name"}, sort_keys=True)


def build(
    spec: ModelSpec, backbone: str, layers: Sequence[str] | None, image_size: tuple[int, int], memo: Memo | None = None
) -> AnomalibModule:
    """A fresh model.

    Args:
        spec (ModelSpec): Which model.
        backbone (str): See `make_model`.
        layers (Sequence[str] | None): See `make_model`.
        image_size (tuple[int, int]): Height and width of the model's input.
        memo (Memo | None): Where its feature maps are kept, which also makes its blur separable; ``None`` leaves the
            model as anomalib has it, which is slower and gives the same scores.

    Returns:
        AnomalibModule: The model, without post-processing (which would need a validation set), and with a
            `ScoreEvaluator`.

    Raises:
        ValueError: If there is no such class, or it can't be built with these arguments on this backbone.
    """
    model = make_model(
        spec.class_path, spec.init_args, backbone, layers, image_size,
        post_processor=False, evaluator=ScoreEvaluator(), visualizer=False,
    )  # fmt: skip
    if memo is not None:
        _take_shortcuts(model, memo)
    return model


def _take_shortcuts(model: AnomalibModule, memo: Memo) -> None:
    # Instead of modules in place of others: models read more of their extractors than what `forward` gives.
    for network in frozen_networks(model.model):
        network.forward = MemoisedFeatures(network, memo)
    for module in model.modules():
        if isinstance(module, GaussianBlur2d) and module.channels == 1 and module.padding == "same":
            module.forward = SeparableBlur(module)


@contextmanager
def without_shortcuts(model: AnomalibModule) -> Iterator[None]:
    """The model as anomalib has it, which is what one who uses it waits for."""
    taken = [(module, module.forward) for module in model.modules() if "forward" in vars(module)]
    for module, _ in taken:
        del module.forward
    try:
        yield
    finally:
        for module, forward in taken:
            module.forward = forward
