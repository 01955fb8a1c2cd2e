"""Rejection rules: from the scores of a training set to the fence past which an image is rejected.

A rule is one object with one method. Every rule is invariant to the order of the scores, moves with a shift and a scale
of them, and answers infinity (reject nothing) where the scores have no spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

_NORMAL_MAD = 1.4826  # median absolute deviation of a normal distribution, inverted


class Rule(Protocol):
    """A rejection rule."""

    def fence(self, scores: np.ndarray) -> float:
        """The score past which an image is rejected.

        Args:
            scores (np.ndarray): ``[N]``, finite; higher is more anomalous.

        Returns:
            float: Images with a score strictly above it are rejected; infinity rejects none.
        """
        ...


@dataclass(frozen=True)
class TukeyFence:
    """Upper inter-quartile-range fence ``Q3 + whisker * IQR``, the rule of the MetaRefine paper.

    Breakdown point 25 %: with more dirty images than that, Q3 is dirty itself and the fence moves out of reach.

    References:
        Tukey, "Exploratory Data Analysis", 1977; Aqeel et al., arXiv 2503.01569.

    Example:
        >>> TukeyFence().fence(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
        7.0
    """

    whisker: float = 1.5

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        lower, upper = np.quantile(scores, [0.25, 0.75])
        return float(upper + self.whisker * (upper - lower)) if upper > lower else float("inf")


@dataclass(frozen=True)
class ShorthFence:
    """A fence anchored in the densest half of the scores: ``centre + width * spread``.

    Centre is the median of the shortest interval that holds half of the scores (the shorth), spread the scaled median
    distance of the scores *below* it. Defects raise a score, so they reach neither before they are the majority:
    breakdown point 50 %. (The half-sample mode was tried as the centre; on 300 scores it jumps about so much that
    clean sets lost up to half of their images.)

    References:
        Andrews et al., "Robust Estimates of Location", 1972 (the shorth); Rousseeuw, "Least Median of Squares
        Regression", 1984.
    """

    width: float = 8.0

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        centre, spread = lower_side_scale(scores)
        return centre + self.width * spread if spread > 0 else float("inf")


@dataclass(frozen=True)
class FDRFence:
    """The lowest fence whose rejected images are expected to be clean in at most a share ``level`` of the cases.

    A score is turned into a p-value under a reference for clean images, an exponential tail ``exp(-u / tail)`` of the
    distance ``u`` from the centre in lower-side spreads (`lower_side_scale`), and the procedure of Benjamini and
    Hochberg sets the fence. It adapts to the contamination: one outlier must be extreme to be rejected, but where a
    third of the images stand out, less is enough. Breakdown point 50 %, as that of its centre and spread.

    The reference is heavier than a normal tail because clean image scores are: on clean ELPV, 5 % lie past 4 spreads.
    Where a data set's clean tail is heavier still, more clean images are rejected than ``level`` says.

    References:
        Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995.
    """

    level: float = 0.1
    tail: float = 1.6

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        centre, spread = lower_side_scale(scores)
        if spread <= 0:
            return float("inf")
        descending = np.sort(scores)[::-1]
        p_values = np.exp(-np.maximum(descending - centre, 0) / (spread * self.tail))
        allowed = self.level * np.arange(1, len(scores) + 1) / len(scores)
        passed = np.flatnonzero(p_values <= allowed)
        # As `level` < 1 a score at the centre (p-value 1) never passes, so there is always a next one.
        return float(descending[passed[-1] + 1]) if len(passed) else float("inf")


RULES: dict[str, type[Rule]] = {"fdr": FDRFence, "iqr": TukeyFence, "shorth": ShorthFence}


def get_rule(name: str) -> Rule:
    """A rule with its default settings.

    Raises:
        ValueError: If there is no rule of that name.
    """
    if name not in RULES:
        msg = f"There is no rejection rule {name!r}. Choose one of {sorted(RULES)}."
        raise ValueError(msg)
    return RULES[name]()


def lower_side_scale(scores: np.ndarray) -> tuple[float, float]:
    """Median of the shorth, and the scaled median distance of the scores below it.

    Args:
        scores (np.ndarray): ``[N]``, ``N >= 1``.

    Returns:
        tuple[float, float]: Centre and spread; for normal scores, about their mean and standard deviation.
    """
    ordered = np.sort(scores)
    half = len(ordered) // 2 + 1
    widths = ordered[half - 1 :] - ordered[: len(ordered) - half + 1]
    start = int(np.argmin(widths))
    centre = float(np.median(ordered[start : start + half]))
    return centre, float(_NORMAL_MAD * np.median(centre - ordered[ordered <= centre]))
