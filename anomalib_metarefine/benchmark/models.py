"""Any anomalib model, on one backbone that all share, ready to be trained by anomalib's Engine."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

import anomalib.models
from anomalib.models.components import AnomalibModule
from anomalib.models.components.filters import GaussianBlur2d
from torchvision.transforms.v2 import Compose, Normalize

from anomalib_metarefine.benchmark.memo import MemoisedFeatures, frozen_networks
from anomalib_metarefine.benchmark.metrics import ScoreEvaluator
from anomalib_metarefine.benchmark.separable import SeparableBlur
from anomalib_metarefine.features.backbone import Backbone, normalization
from anomalib_metarefine.features.offline import use_offline_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anomalib.pre_processing import PreProcessor

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
        backbone (str): timm architecture, for models whose class takes a ``backbone``.
        layers (Sequence[str] | None): Modules of it to read, for models that take ``layers``; those that take one
            ``layer`` get the last. ``None`` takes strides 8 and 16. ``init_args`` that name a backbone come with
            their own layers, or with the class's.
        image_size (tuple[int, int]): Height and width of the model's input.
        memo (Memo | None): Where its feature maps are kept, which also makes its blur separable; ``None`` leaves the
            model as anomalib has it, which is slower and gives the same scores.

    Returns:
        AnomalibModule: The model, with its own pre-processing at the given size (normalised as the backbone was
            trained), without post-processing (which would need a validation set), and with a `ScoreEvaluator`.

    Raises:
        ValueError: If there is no such class, or it can't be built with these arguments on this backbone.
    """
    model_class = _model_class(spec.class_path)
    use_offline_weights()
    accepted = signature(model_class).parameters
    arguments = dict(spec.init_args)
    if "backbone" in accepted and "backbone" not in arguments:
        layers = list(layers or Backbone(backbone, pre_trained=False).layers)
        shared = {"backbone": backbone, "layers": layers, "layer": layers[-1]}
        arguments = {name: value for name, value in shared.items() if name in accepted} | arguments
    where = f" on {arguments['backbone']}" if "backbone" in arguments else ""
    try:
        model = model_class(
            **arguments,
            pre_processor=_pre_processor(model_class, arguments.get("backbone"), image_size),
            post_processor=False,
            evaluator=ScoreEvaluator(),
            visualizer=False,
        )
    except Exception as error:  # upstream's messages don't tell which model they are about
        msg = f"{model_class.__name__} can't be built{where}: {error}"
        raise ValueError(msg) from error
    if memo is not None:
        _take_shortcuts(model, memo)
    return model


def _model_class(class_path: str) -> type[AnomalibModule]:
    module, _, name = class_path.rpartition(".")
    try:
        # Not anomalib's get_model, which imports from anomalib alone and does not tell what arguments a class takes.
        found = getattr(import_module(module or anomalib.models.__name__), name)
    except (ModuleNotFoundError, AttributeError) as error:
        msg = f"There is no model {class_path!r} ({error}). Give a name in anomalib.models, or a full path."
        raise ValueError(msg) from error
    if not (isinstance(found, type) and issubclass(found, AnomalibModule)):
        msg = f"{class_path} is not an anomalib model: expected a subclass of AnomalibModule."
        raise ValueError(msg)
    return found


def _pre_processor(
    model_class: type[AnomalibModule], backbone: str | None, image_size: tuple[int, int]
) -> PreProcessor:
    """The model's own at this size; where it normalises for a backbone, as that one was trained."""
    own = model_class.configure_pre_processor(image_size=tuple(image_size))
    if backbone is None or not isinstance(own.transform, Compose):
        return own
    mean, std = normalization(backbone)
    right = Normalize(mean=list(mean), std=list(std))
    parts = [right if isinstance(part, Normalize) else part for part in own.transform.transforms]
    return type(own)(Compose(parts))


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
