"""The anomaly map over the image, for a person to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path


def overlay(image: np.ndarray, anomaly_map: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """Lay the map over the image, blue for 0, green for 0.5, red for 1.

    Args:
        image (np.ndarray): ``[H, W, 3]`` in [0, 1], RGB.
        anomaly_map (np.ndarray): ``[h, w]`` in [0, 1]; enlarged to the image's size.
        strength (float): Of the colours, in [0, 1].

    Returns:
        np.ndarray: ``[H, W, 3]`` uint8, RGB.
    """
    size = image.shape[1::-1]
    enlarged = Image.fromarray(anomaly_map.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(enlarged)[..., None]
    colours = (1.5 - np.abs(4 * values - np.array([3.0, 2.0, 1.0], np.float32))).clip(0, 1)  # the classic "jet"
    return (255 * ((1 - strength) * image + strength * colours)).round().astype(np.uint8)


def write_overlay(file: Path, image: np.ndarray, anomaly_map: np.ndarray) -> None:
    """Write an overlay as PNG, in one step: never half a file under its name."""
    part = file.with_name(f".{file.name}.part")
    Image.fromarray(overlay(image, anomaly_map)).save(part, format="PNG", compress_level=1)
    part.replace(file)
