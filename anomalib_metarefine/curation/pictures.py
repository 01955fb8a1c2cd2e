"""Pictures for people: small ones of any image file, and anomaly maps and outlines on them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage

from anomalib_metarefine.images.reading import decode_image, read_image

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 256  # pixels
_COLOURMAP = "inferno"  # perceptually uniform: equal steps look equal, in grey print too
_LINE = (255, 210, 0)


def thumbnail(image: Path | bytes, side: int = SIDE) -> Image.Image:
    """A small 8-bit picture of any image file, upright, as the detector sees it: the anomaly map must fit.

    Deep images are stretched between their 0.5 and 99.5 percentiles. Every thumbnail has about the area of a square, so
    that very wide images stay legible; none is enlarged.

    Args:
        image (Path | bytes): Image file, or its content.
        side (int): Of that square, in pixels.

    Returns:
        Image.Image: Mode ``L`` or ``RGB``.

    Raises:
        OSError: If the file is missing.
        UnreadableImageError: If it is no image.
    """
    file = decode_image(image) if isinstance(image, bytes) else read_image(image)
    levels = file.levels[..., 0] if file.grey else file.levels
    if levels.dtype != np.uint8:
        low, high = np.percentile(levels, [0.5, 99.5])
        levels = (255 * ((levels - low) / max(high - low, 1e-12)).clip(0, 1)).astype(np.uint8)
    drawn = Image.fromarray(np.ascontiguousarray(levels))
    longest, shortest = max(drawn.size), min(drawn.size)
    scale = min(1.0, side * min(3.0, math.sqrt(longest / shortest)) / longest)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    return drawn.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def heat_layer(heat: np.ndarray, limits: tuple[float, float], size: tuple[int, int]) -> Image.Image:
    """An anomaly map to lay over its image; the hotter, the more it covers.

    Args:
        heat (np.ndarray): ``[H x W]`` anomaly map; NaN counts as the lower limit.
        limits (tuple[float, float]): Values of the first and the last colour.
        size (tuple[int, int]): Width and height of the layer.

    Returns:
        Image.Image: Mode ``RGBA``.
    """
    import matplotlib as mpl

    low, high = limits
    value = (np.asarray(heat, dtype=np.float32) - low) / max(high - low, 1e-12)
    value = np.nan_to_num(value, nan=0.0).clip(0, 1)
    value = np.asarray(Image.fromarray(value).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour = mpl.colormaps[_COLOURMAP](value)
    colour[..., 3] = 0.72 * np.sqrt(value)
    return Image.fromarray((255 * colour).round().astype(np.uint8))


def overlay(image: Image.Image, heat: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """The anomaly map laid over its image in grey, mode ``RGB``; arguments as for `heat_layer`."""
    grey = image.convert("L").convert("RGBA")
    return Image.alpha_composite(grey, heat_layer(heat, limits, image.size)).convert("RGB")


def outline(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image with a line around the patches of a mask ``[H x W]``: what is inside stays visible."""
    large = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)) > 0
    width = max(1, round(min(image.size) / 100))
    inner = ndimage.binary_erosion(large, iterations=width, border_value=1)
    outer = ndimage.binary_dilation(large, iterations=width)
    drawn = np.array(image.convert("RGB"))
    drawn[outer & ~large] = 0  # a dark and a bright line: one of them shows on any ground
    drawn[large & ~inner] = _LINE
    return Image.fromarray(drawn)


def colour_stops() -> list[tuple[int, str]]:
    """Stops of a legend of anomaly maps: per cent and colour."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return [(p, to_hex(mpl.colormaps[_COLOURMAP](p / 100))) for p in range(0, 101, 10)]
