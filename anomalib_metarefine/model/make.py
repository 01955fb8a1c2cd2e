"""Any model of anomalib by its name, on a backbone of one's choice."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

import anomalib.models
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from lightning import LightningModule
from torchvision.transforms.v2 import Compose, Normalize

from anomalib_metarefine.features.backbone import Backbone, normalization
from anomalib_metarefine.features.offline import use_offline_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anomalib.pre_processing import PreProcessor


def make_model(
    class_path: str,
    init_args: Mapping[str, Any],
    backbone: str,
    layers: Sequence[str] | None,
    image_size: tuple[int, int],
    **parts: Any,  # noqa: ANN401
) -> AnomalibModule:
    """A fresh model.

    Args:
        class_path (str): A name in ``anomalib.models``, or a full path.
        init_args (Mapping[str, Any]): Arguments of the class that differ from its defaults.
        backbone (str): timm architecture, for models whose class takes a ``backbone``.
        layers (Sequence[str] | None): Modules of it to read, for models that take ``layers``; those that take one
            ``layer`` get the last. ``None`` takes strides 8 and 16. ``init_args`` that name a backbone come with
            their own layers, or with the class's.
        image_size (tuple[int, int]): Height and width of the model's input.
        **parts (Any): ``post_processor``, ``evaluator``, ``visualizer``.

    Returns:
        AnomalibModule: With its own pre-processing at the given size, normalised as the backbone was trained.

    Raises:
        ValueError: If there is no such class, or it can't be built with these arguments on this backbone.
    """
    cls = model_class(class_path)
    use_offline_weights()
    accepted = signature(cls).parameters
    arguments = dict(init_args)
    if "backbone" in accepted and "backbone" not in arguments:
        layers = list(layers or Backbone(backbone, pre_trained=False).layers)
        shared = {"backbone": backbone, "layers": layers, "layer": layers[-1]}
        arguments = {name: value for name, value in shared.items() if name in accepted} | arguments
    where = f" on {arguments['backbone']}" if "backbone" in arguments else ""
    try:
        pre_processor = _pre_processor(cls, arguments.get("backbone"), image_size)
        return cls(**arguments, pre_processor=pre_processor, **parts)
    except Exception as error:  # upstream's messages don't tell which model they are about
        msg = f"{cls.__name__} can't be built{where}: {error}"
        raise ValueError(msg) from error


def length_of_training(
    model: AnomalibModule, max_epochs: int | None, max_steps: int | None, how: str
) -> dict[str, int]:
    """What the Engine is told about the length of training; models that know better overrule it.

    Args:
        model (AnomalibModule): Tells whether it knows.
        max_epochs (int | None): Passes over the training images.
        max_steps (int | None): Gradient steps.
        how (str): What to set, for the message.

    Raises:
        ValueError: If neither the model nor the caller says when to stop.
    """
    own = model.trainer_arguments
    if max_epochs is None and max_steps is None:
        if own.keys() & {"max_epochs", "max_steps"}:
            return {}
        msg = f"{type(model).__name__} does not know when to stop training. Set {how}."
        raise ValueError(msg)
    return {
        "max_epochs": -1 if max_epochs is None else max_epochs,
        "max_steps": -1 if max_steps is None else max_steps,
    }


def sets_itself_in_validation(model: AnomalibModule) -> bool:
    """Whether a part of the model comes from a validation set; to others it is of no use."""
    own = type(model).on_validation_start
    return own not in (LightningModule.on_validation_start, MemoryBankMixin.on_validation_start)


def model_class(class_path: str) -> type[AnomalibModule]:
    """The class of a name in ``anomalib.models``, or of a full path; ValueError if it is no model of anomalib's."""
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


def _pre_processor(cls: type[AnomalibModule], backbone: str | None, image_size: tuple[int, int]) -> PreProcessor:
    """The model's own at this size; where it normalises for a backbone, as that one was trained."""
    own = cls.configure_pre_processor(image_size=tuple(image_size))
    if backbone is None or not isinstance(own.transform, Compose):
        return own
    mean, std = normalization(backbone)
    right = Normalize(mean=list(mean), std=list(std))
    parts = [right if isinstance(part, Normalize) else part for part in own.transform.transforms]
    return type(own)(Compose(parts))
