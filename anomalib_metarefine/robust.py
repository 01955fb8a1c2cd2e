"""Statistics of scores that outliers on the upper side can't touch."""

from __future__ import annotations

import numpy as np

NORMAL_MAD = 1.4826  # median absolute deviation of a normal distribution, inverted


def lower_side_scale(scores: np.ndarray) -> tuple[float, float]:
    """Median of the shorth, and the scaled median distance of the scores below it.

    Args:
        scores (np.ndarray): ``[N]``, ``N >= 1``.

    Returns:
        tuple[float, float]: Centre and spread; for normal scores, about their mean and standard deviation.
    """
    ordered = np.sort(scores)
    centre = float(np.median(densest(ordered, len(ordered) // 2 + 1)))
    return centre, spread_below(ordered, centre)


def densest(ordered: np.ndarray, count: int) -> np.ndarray:
    """The shortest run of ``count`` of the sorted scores, the lowest of those equally short."""
    start = int(np.argmin(ordered[count - 1 :] - ordered[: len(ordered) - count + 1]))
    return ordered[start : start + count]


def spread_below(ordered: np.ndarray, centre: float) -> float:
    """Scaled median distance of the scores up to ``centre`` from it: what anomalies, being high, cannot touch."""
    return float(NORMAL_MAD * np.median(centre - ordered[ordered <= centre]))
