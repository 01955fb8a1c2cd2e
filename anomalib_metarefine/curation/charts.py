"""Numbers of the report in words, and the histogram of the scores in the coordinates of its drawing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

_DECISIONS = ("keep", "review", "reject")  # stacked in this order from the bottom
_PLOT = (46, 404, 18, 170)  # left, right, top and bottom of the histogram's axes in its 420 x 216 drawing


def histogram(table: pd.DataFrame) -> dict[str, Any] | None:
    """Bars and ticks of all scores in the coordinates of the drawing; ``None`` if no score is finite.

    A long tail is drawn in the last bar, so that the bulk stays legible.
    """
    from matplotlib.ticker import MaxNLocator

    table = table[np.isfinite(table.score)]
    if table.empty:
        return None
    scores = table.score.to_numpy()
    low, half, most = np.quantile(scores, [0, 0.5, 0.99])
    high = min(scores.max(), low + 2 * (most - low))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    left, right, top, bottom = _PLOT
    bins = np.linspace(low, high, int(np.clip(2 * math.sqrt(len(scores)), 8, 36)) + 1)
    counts = {name: np.histogram(scores[table.decision == name].clip(low, high), bins)[0] for name in _DECISIONS}
    highest = max(int(np.sum(list(counts.values()), axis=0).max()), 1)

    def across(value: float) -> float:
        return round(left + (value - low) / (high - low) * (right - left), 1)

    bars = []
    for k, start in enumerate(bins[:-1]):
        y = float(bottom)
        for name, count in counts.items():
            if count[k]:
                height = max(2.0, count[k] / highest * (bottom - top))  # one image in 10,000 must still be seen
                y -= height
                bars.append({"kind": name, "x": across(start), "y": round(y, 1), "height": round(height, 1)})
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    levels = MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]).tick_values(0, highest)
    return {
        "bars": bars,
        "width": round((right - left) / (len(bins) - 1) - 1, 2),
        "ticks": [(across(t), f"{t:g}".replace("-", "\N{MINUS SIGN}")) for t in ticks if low <= t <= high],
        "levels": [(round(bottom - v / highest * (bottom - top), 1), f"{int(v):,}") for v in levels if v <= highest],
        "median": float(half),
        "scores": len(scores),
        "beyond": int((scores > high).sum()),
        "highest": float(scores.max()),
    }


def number(value: float, digits: int = 1) -> str:
    """With a true minus sign; an en dash where there is no value."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
