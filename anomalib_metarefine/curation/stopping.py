"""When a person may stop looking: how many dirty images are left, and whether enough of them are found.

Two answers, of different strength. The *audit* draws images at random from those that nobody has looked at; what it
says assumes nothing about scores or order. The *recall test* reads the answers in the order shown; it assumes that the
order is no worse than chance. Neither knows whether the person is right.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import gammaln
from scipy.stats import hypergeom

if TYPE_CHECKING:
    from collections.abc import Sequence

RECALL = 0.9  # share of the dirty images that is to be found
LEVEL = 0.95  # of the bound and of the test
_DIRTY_BEFORE, _CLEAN_BEFORE = 0.1, 1.0  # the bet before the first draw: most images that nobody looked at are clean


class Look(NamedTuple):
    """An image that was shown to a person."""

    audit: bool  # whether it was drawn at random from all images that had not been shown until then
    dirty: bool | None  # the answer; None while there is none


class Standing(NamedTuple):
    """Where a review stands."""

    total: int  # images in all
    looked: int  # images with an answer
    found: int  # dirty ones among them
    about: float | None  # dirty images left, best estimate; None before the first answer, which tells nothing
    at_most: int  # dirty images left, upper bound at the level 0.95, from the audit alone
    audited: int  # images with an answer that were drawn at random
    stop: bool  # whether at least the wanted share of the dirty images is found, at the level 0.95
    more: int  # looks until one can stop if all of them are clean; 0 where one can
    reason: str  # why one can stop, or can't yet, in a sentence


def left_at_most(looks: Sequence[Look], total: int, level: float = LEVEL) -> int:
    """Upper bound of the dirty images left, from the audit alone; it holds at every look at once.

    Given what was shown before, an image drawn at random from a pool of ``U`` with ``R`` dirty ones is dirty with
    probability ``R / U``, however the other images were chosen. A bet on each draw against that probability multiplies
    to a nonnegative martingale for the true ``R``; numbers whose martingale exceeds ``1 / (1 - level)`` are ruled out
    (Ville's inequality). While all draws are clean this is nearly the exact hypergeometric bound, but unlike that one
    it stays true for a person who reads it after every page and stops when it suits.

    Args:
        looks (Sequence[Look]): All images shown, in the order in which they were chosen. Images without an answer
            count as dirty ones left, and as whatever loosens the bound where others were drawn.
        total (int): Number of images.
        level (float): Probability that the bound holds, over the draws of the audit.

    Returns:
        int: Between 0 and the number of images without an answer.

    Raises:
        ValueError: If more images were shown than there are.

    References:
        Waudby-Smith and Ramdas, "Confidence sequences for sampling without replacement", NeurIPS 2020.
    """
    return _Audit.of(looks, total).left_at_most(level=level)


class _Audit(NamedTuple):
    """The martingale after all looks, for every number of dirty images among those never shown."""

    evidence: np.ndarray
    unseen: int
    undecided: int
    draws: int
    hits: int

    @classmethod
    def of(cls, looks: Sequence[Look], total: int) -> _Audit:
        unseen = total - len(looks)
        if unseen < 0:
            msg = f"{len(looks)} images were shown, but there are only {total}."
            raise ValueError(msg)
        left, evidence = np.arange(unseen + 1), np.zeros(unseen + 1)
        dirty = np.array([look.dirty is True for look in looks], dtype=int)
        without = np.array([look.dirty is None for look in looks], dtype=int)
        found_from, without_from = dirty[::-1].cumsum()[::-1], without[::-1].cumsum()[::-1]
        hits = draws = 0
        for place, look in enumerate(looks):
            if not look.audit:
                continue
            pool, bet = total - place, (_DIRTY_BEFORE + hits) / (_DIRTY_BEFORE + _CLEAN_BEFORE + draws)
            fewest = left + found_from[place]
            most = np.minimum(fewest + without_from[place], pool)
            with np.errstate(divide="ignore"):
                if_clean = math.log1p(-bet) - np.log(np.maximum(pool - fewest, 0) / pool)
                if_dirty = math.log(bet) - np.log(most / pool)
            evidence += {True: if_dirty, False: if_clean, None: np.minimum(if_dirty, if_clean)}[look.dirty]
            draws, hits = draws + 1, hits + (look.dirty is not False)
        return cls(evidence, unseen, int(without.sum()), draws, hits)

    def left_at_most(self, further: int = 0, level: float = LEVEL) -> int:
        """The bound, now or after ``further`` clean draws: the sums over draws are ratios of gamma functions."""
        left, further = np.arange(self.unseen + 1), min(further, self.unseen)
        clean = _CLEAN_BEFORE + self.draws - self.hits
        bets = _log_rising(clean, further) - _log_rising(clean + _DIRTY_BEFORE + self.hits, further)
        remain = self.unseen - further + 1
        chance = _log_rising(np.maximum(remain - left, 1), further) - _log_rising(remain, further)
        evidence = np.where(left < remain, self.evidence + bets - chance, np.inf)
        return int(np.flatnonzero(evidence < -math.log1p(-level)).max(initial=0)) + self.undecided


def _log_rising(start: np.ndarray | float, count: int) -> np.ndarray:
    """Logarithm of ``start * (start + 1) * ...``, ``count`` factors."""
    return gammaln(start + count) - gammaln(start)


def recall_p_value(answers: Sequence[bool], total: int, target: float = RECALL) -> float:
    """Test of the hypothesis that less than the wanted share of the dirty images is found.

    From every place in the order, the images shown since are taken for a random sample of those not shown before; the
    smallest of the p-values counts. An order that brings dirty images early makes the test stricter than it says.

    Args:
        answers (Sequence[bool]): Whether each image was dirty, in the order shown.
        total (int): Number of images.
        target (float): Share of the dirty images to be found.

    Returns:
        float: 1 before the first look, 0 where nothing can be left.

    References:
        Callaghan and Mueller-Hansen, "Statistical stopping criteria for automated screening in systematic reviews",
        Systematic Reviews 9, 2020.
    """
    count = len(answers)
    if count == 0:
        return 1.0
    dirty = np.asarray(answers, dtype=bool)
    hits = int(dirty.sum())
    missed = math.floor(hits / target + 1e-9) + 1  # dirty images in all that would make the recall too small
    # Clean images at the beginning of a sample only lower its p-value: others need not be tried.
    start = np.concatenate([[0], np.flatnonzero(dirty[:-1]) + 1])
    found = np.arange(len(start))
    rest, needed = total - start, missed - found
    impossible = needed > rest
    p = hypergeom.cdf(hits - found, rest, np.minimum(needed, rest), count - start)
    return float(np.where(impossible, 0.0, p).min())


def standing(looks: Sequence[Look], total: int, about: float, target: float = RECALL) -> Standing:
    """Where a review stands, and whether it may end.

    Args:
        looks (Sequence[Look]): As for `left_at_most`.
        total (int): Number of images.
        about (float): Best estimate of the dirty images left; brought inside of what is possible.
        target (float): Share of the dirty images to be found.
    """
    answers = [look.dirty for look in looks if look.dirty is not None]
    looked, found = len(answers), sum(answers)
    at_most = left_at_most(looks, total)
    p = recall_p_value(answers, total, target)
    by_audit, by_order = _enough(found, at_most, target), p < 1 - LEVEL
    share = f"{target:.0%}".replace("%", " %")
    if looked == total:
        more, reason = 0, "Every image was looked at."
    elif by_audit:
        more = 0
        reason = f"The random images say that at least {share} of the dirty images are found, whatever the order."
    elif by_order:
        more = 0
        reason = (
            f"So few dirty images came lately that at least {share} are found, if the order is no worse than chance."
        )
    else:
        more = _looks_needed(looks, answers, total, target)
        reason = f"Not yet. If the next {more} images are all clean, at least {share} of the dirty ones are found."
    inside = float(min(max(about, 0.0), at_most)) if looked else None
    audited = sum(look.audit and look.dirty is not None for look in looks)
    return Standing(total, looked, found, inside, at_most, audited, more == 0, more, reason)


def _enough(found: int, left: int, target: float) -> bool:
    return found >= target * (found + left) - 1e-9


def _looks_needed(looks: Sequence[Look], answers: Sequence[bool], total: int, target: float) -> int:
    """Fewest further looks, all clean, after which one may stop: at random, or down the order."""
    audit = _Audit.of(looks, total)

    def audited(more: int) -> bool:
        return _enough(sum(answers), audit.left_at_most(more), target)

    def ordered(more: int) -> bool:
        return recall_p_value([*answers, *[False] * more], total, target) < 1 - LEVEL

    low, high = 1, total - len(answers)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if audited(middle) or ordered(middle) else (middle + 1, high)
    return low
