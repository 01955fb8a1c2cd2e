"""The bets of the drift monitor: what each is on, and what it wins or loses with a score. See drift.py for the idea.

References:
    - Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024, arXiv 2010.09686.
    - Wilks, "Determination of Sample Sizes for Setting Tolerance Limits", 1941 (the share past an order statistic).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

_LEVELS = (10, 25, 50, 75, 90)  # per cent; further out the reference says too little, and defects are at home there
_ODDS = (1.5, 2.5, 5.0)  # changes of the odds that are bet on: small ones are found late, but are found
_MOST_LIKELY = 0.95  # an event that may be this frequent already can't become much more so


@dataclass(frozen=True)
class Bets:
    """K bets: that a score lies past a quantile with ``odds`` times the odds that it has."""

    quantile: np.ndarray  # [K] scores
    upward: np.ndarray  # [K] of bool, whether past means above
    odds: np.ndarray  # [K], above 1
    chance: np.ndarray  # [K], by the reference alone
    weight: np.ndarray  # [K], images that the chance is worth; infinite for anchored bets

    @classmethod
    def make(cls, quantiles: Sequence[float], images: int, risk: float, defect_rate: float) -> Bets:
        """All bets; the anchored ones are fair with probability ``1 - risk`` over the sample that the reference is."""
        rows = []
        each = risk / (2 * len(_LEVELS))
        for level in _LEVELS:
            for upward in (True, False):
                rank = _rank(level / 100, images, upward)
                expected = (rank / (images + 1), images + 1.0)
                limit = (float(betaincinv(rank, images + 1 - rank, 1 - each)), math.inf)
                for chance, weight in (expected, limit):
                    with_defects = chance + defect_rate * (1 - chance) if upward else chance
                    if with_defects < _MOST_LIKELY:
                        rows += [(quantiles[level], upward, odds, with_defects, weight) for odds in _ODDS]
        return cls(*(np.array(column) for column in zip(*rows, strict=True)))

    def past(self, scores: np.ndarray | float) -> np.ndarray:
        """``[... x K]`` of bool for scores ``[...]``. A score at the quantile is not past it."""
        scores = np.asarray(scores)[..., None]
        return np.where(self.upward, scores, -scores) > np.where(self.upward, self.quantile, -self.quantile)

    def gains(self, past: np.ndarray, learned: int, learned_past: np.ndarray) -> np.ndarray:
        """``[K]``: what an image adds to the logarithm of each bet's wealth, the log-likelihood ratio.

        Args:
            past (np.ndarray): ``[K]`` of bool, of this image.
            learned (int): Images before it that the learning bets know.
            learned_past (np.ndarray): ``[K]``, how many of them were past.
        """
        chance = self.chance + (learned_past - learned * self.chance) / (self.weight + learned)
        return past * np.log(self.odds) - np.log1p((self.odds - 1) * chance)


def _rank(level: float, images: int, upward: bool) -> int:
    """Rank of a quantile in a sample, from 1, counted from the end that scores past it lie at.

    The quantile lies between two order statistics; the one that is further in is on the safe side. The share of all
    scores that lies past an order statistic of rank r follows the beta distribution (r, images + 1 - r).
    """
    position = (images - 1) * level
    return images - math.floor(position) if upward else math.ceil(position) + 1
