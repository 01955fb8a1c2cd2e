"""The curation score: its parts brought to one scale and added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.robust import lower_side_scale

if TYPE_CHECKING:
    from collections.abc import Mapping


def hybrid(
    parts: Mapping[str, np.ndarray], weights: Mapping[str, float], kept: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """Weighted sum of the standardised parts, standardised again: one unit is one robust standard deviation.

    Args:
        parts (Mapping[str, np.ndarray]): ``[N]`` each, higher is more anomalous, of any scale.
        weights (Mapping[str, float]): Weight of each part.
        kept (np.ndarray): ``[N]`` mask of the images that count as normal.

    Returns:
        tuple[np.ndarray, dict[str, float]]: Scores ``[N]``, and how much one unit of each part adds to them.

    Example:
        >>> parts = {"likelihood": np.array([1.0, 2.0, 3.0, 9.0]), "neighbours": np.array([20.0, 10.0, 30.0, 60.0])}
        >>> hybrid(parts, {"likelihood": 1.0, "neighbours": 1.0}, np.array([True, True, True, False]))[0].argmax()
        np.int64(3)
    """
    spreads = {name: lower_side_scale(values[kept])[1] or 1.0 for name, values in parts.items()}
    total = sum(weights[name] / spreads[name] * values for name, values in parts.items())
    centre, spread = lower_side_scale(total[kept])
    spread = spread or 1.0
    return (total - centre) / spread, {name: weights[name] / spreads[name] / spread for name in parts}
