"""Scores brought to one scale and added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.robust import lower_side_scale

if TYPE_CHECKING:
    from collections.abc import Mapping

_FEWEST = 5  # kept images of a variant that a scale can be read off


def standardised(values: np.ndarray, kept: np.ndarray, variants: np.ndarray | None = None) -> np.ndarray:
    """Values in robust standard deviations of the kept images, variant by variant.

    Args:
        values (np.ndarray): ``[N]``, higher is more anomalous.
        kept (np.ndarray): ``[N]`` mask of the images that count as normal.
        variants (np.ndarray | None): ``[N]`` number of each image's variant; ``None`` if there is one.

    Returns:
        np.ndarray: ``[N]``, about 0 for a usual image of its variant.

    Example:
        >>> values, kept = np.array([1.0, 2.0, 3.0, 90.0]), np.array([True, True, True, False])
        >>> standardised(values, kept).round(1)
        array([ -0.7,   0.7,   2. , 119.4])
    """
    result = np.empty(len(values))
    variants = np.zeros(len(values), dtype=int) if variants is None else variants
    for variant in np.unique(variants):
        own = variants == variant
        normal = own & kept
        centre, spread = lower_side_scale(values[normal if normal.sum() >= min(_FEWEST, kept.sum()) else own])
        result[own] = (values[own] - centre) / (spread or 1.0)
    return result


def hybrid(
    parts: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    kept: np.ndarray,
    variants: np.ndarray | None = None,
) -> np.ndarray:
    """Weighted sum of the standardised parts, standardised again: one unit is one robust standard deviation.

    Args:
        parts (Mapping[str, np.ndarray]): ``[N]`` each, higher is more anomalous, of any scale.
        weights (Mapping[str, float]): Weight of each part.
        kept (np.ndarray): See `standardised`.
        variants (np.ndarray | None): See `standardised`.

    Returns:
        np.ndarray: ``[N]``.

    Example:
        >>> parts = {"likelihood": np.array([1.0, 2.0, 3.0, 9.0]), "neighbours": np.array([20.0, 10.0, 30.0, 60.0])}
        >>> hybrid(parts, {"likelihood": 1.0, "neighbours": 1.0}, np.array([True, True, True, False])).argmax()
        np.int64(3)
    """
    total = sum(weights[name] * standardised(values, kept, variants) for name, values in parts.items())
    return standardised(np.asarray(total), kept, variants)
