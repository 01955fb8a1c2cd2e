"""One resize for training and for the exported graph.

anomalib switches ``antialias`` off when it exports a ``Resize``, so a large image is scored differently by the exported
model than by the trained one (upstream issues 2448, 3548, 3726). Exporting the antialiased operator instead does not
help: OpenVINO's conversion drops the flag. The antialiased resize is a linear map per axis, though, and two small
matrix products export exactly.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import nn
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

from anomalib_metarefine.images.reading import header_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_HEADERS = 1000  # read at most: of a million images in an object store, that alone would take an hour
_BAND = 32  # output rows: windows overlap by little, and there are few of them


class ExactResize(nn.Module):
    """Antialiased bilinear or bicubic resize as matrix products; equals ``torchvision``'s to the rounding error.

    Positions are computed with integers: on processors with bfloat16, OpenVINO lowers floating-point arithmetic to 8
    bits of mantissa by default, and pixel positions above 256 would no longer be whole numbers.

    Args:
        size (tuple[int, int]): Output height and width.
        bicubic (bool): Bicubic, not bilinear.

    Example:
        >>> image = torch.rand(1, 3, 300, 200)
        >>> expected = Resize((256, 256), antialias=True)(image)
        >>> bool((ExactResize((256, 256))(image) - expected).abs().max() < 1e-5)
        True
    """

    def __init__(self, size: tuple[int, int], bicubic: bool = False) -> None:
        super().__init__()
        self.size, self.bicubic = size, bicubic

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize ``[... x H x W]`` to ``[... x size]``."""
        if tuple(images.shape[-2:]) == self.size:
            return images
        return _resize_rows(_resize_rows(images, self.size[0], self.bicubic).mT, self.size[1], self.bicubic).mT


def _resize_rows(images: torch.Tensor, target: int, bicubic: bool) -> torch.Tensor:
    """Resize ``[... x H x W]`` to ``[... x target x W]``, ``_BAND`` output rows at a time from the rows they depend on.

    One product with the whole filter would multiply with zeros mostly: for an image of 1024 pixels it costs three times
    as much as a small backbone. A branch for images that need no resize would be an ``If`` in the exported graph, and
    OpenVINO 2026.4 gives wrong results the first time it runs one on a dynamic shape.
    """
    source = images.shape[-2]
    bands = -(-target // _BAND)
    one = 2 * torch.sym_max(source, target)  # where the kernel's argument is 1, in units of 1 / (2 target) rows
    support = 2 * one if bicubic else one  # of the filter, to either side
    window = torch.sym_min(source, (_BAND * source + support) // target + 2)
    first = 2 * _BAND * torch.arange(bands, device=images.device) + 1
    start = ((first * source - target - support) // (2 * target)).clamp_min(0).clamp_max(source - window)
    inputs = start.unsqueeze(1) + torch.arange(window, device=images.device)  # [bands x window]
    outputs = torch.arange(bands * _BAND, device=images.device).view(bands, _BAND, 1)
    distances = ((2 * inputs.unsqueeze(1) + 1) * target - (2 * outputs + 1) * source).abs()
    if bicubic:
        weights = _keys(distances.to(images.dtype) / one)
        total = weights.sum(2, keepdim=True)
        total = torch.where(total > 0, total, 1)  # rows past the last, which are cut off, may see no input
    else:
        weights = (one - distances).clamp_min(0)
        total = weights.sum(2, keepdim=True).clamp_min(1)
    weights = weights.to(images.dtype) / total.to(images.dtype)
    banded = images.index_select(-2, inputs.flatten()).unflatten(-2, (bands, window))
    return (weights @ banded).flatten(-3, -2)[..., :target, :]


class ExactPositions(TorchFunctionMode):
    """While it is entered, antialiased bicubic interpolation is done as two matrix products.

    A transformer brings its position embeddings to the size of the images by it. OpenVINO and ONNX Runtime have another
    bicubic filter and drop the antialiasing: scores of the exported graph were off by 2 to 20 per cent.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Replace ``interpolate(x, size, mode="bicubic", antialias=True)``; leave everything else as it is."""
        del types
        kwargs = kwargs or {}
        if func is not interpolate or kwargs.get("mode") != "bicubic" or not kwargs.get("antialias"):
            return func(*args, **kwargs)
        (maps,), (height, width) = args, kwargs["size"]
        rows = _bicubic(maps.shape[-2], height).to(maps)
        return rows @ maps @ _bicubic(maps.shape[-1], width).to(maps).mT


def _bicubic(source: int, target: int) -> torch.Tensor:
    """Filter of torch's antialiased bicubic interpolation, ``[target x source]``."""
    scale = source / target
    centres = (torch.arange(target) + 0.5) * scale
    weights = _keys((torch.arange(source) + 0.5 - centres.unsqueeze(1)).abs() / max(scale, 1))
    return weights / weights.sum(1, keepdim=True)


def _keys(distance: torch.Tensor) -> torch.Tensor:
    """Bicubic kernel of Keys 1981, with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0))


def suggested_size(height: float, width: float, area: float = 256 * 256, multiple: int = 32) -> tuple[int, int]:
    """A size of the shape of an image that backbones take.

    Args:
        height (float): Of the image, in any unit.
        width (float): In the same unit.
        area (float): Pixels wanted.
        multiple (int): Of which both sides must be multiples.

    Example:
        >>> suggested_size(800, 320)
        (416, 160)
    """
    scale = (area / (height * width)) ** 0.5
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


def usual_size(paths: Sequence[str | Path]) -> tuple[int, int]:
    """A size of the shape of most image files, at the area of 256 x 256 pixels; headers of a thousand tell it."""
    paths = paths[:: max(1, math.ceil(len(paths) / _HEADERS))]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        sizes = [size for size in pool.map(header_size, paths) if size]
    return suggested_size(median(height / width for height, width in sizes) if sizes else 1.0, 1.0)


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor with the same resize in training and export.

    ``transform`` stays what anomalib knows (a torchvision ``Resize`` and ``Normalize``), so that datamodules,
    checkpoints and every other part of anomalib treat it as usual; only the exported counterpart differs.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.replace(transform)

    def replace(self, transform: Transform | None) -> None:
        """Take another transform, and with it its exported counterpart."""
        self.transform, self.export_transform = transform, exact_export_transform(transform)

    def load_checkpoint_config(self, config: dict) -> None:
        """Restore the transform from a checkpoint."""
        super().load_checkpoint_config(config)
        self.replace(self.transform)


def exact_export_transform(transform: Transform | None) -> nn.Module | None:
    """The transform with `ExactResize` for every antialiased two-sided ``Resize``; all else as anomalib exports it."""
    if isinstance(transform, Compose):
        return nn.Sequential(*(exact_export_transform(part) for part in transform.transforms))
    if isinstance(transform, Resize) and transform.antialias and len(transform.size or ()) == 2:
        kind = InterpolationMode(transform.interpolation)
        if kind in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
            return ExactResize(tuple(transform.size), kind is InterpolationMode.BICUBIC)
    return get_exportable_transform(transform)
