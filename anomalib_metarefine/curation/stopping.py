"""When a person may stop looking: how many dirty images are left, and whether enough of them are found.

Two answers, of different strength. The *audit* draws images at random from those that nobody has looked at; what it
says assumes nothing about scores or order. The *forecast* reads off the answers how the share of dirty images falls
along the order; it is a model, and needs fewer looks. Neither knows whether the person is right.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import expit, gammaln, pdtrc
from scipy.stats import norm, rankdata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RECALL = 0.9  # share of the dirty images that is to be found
LEVEL = 0.95  # of the bound
DOUBT = 0.1  # of the forecast, at which one may stop
_DIRTY_BEFORE, _CLEAN_BEFORE = 0.1, 1.0  # the bet before the first draw: most images that nobody looked at are clean
_BASE, _SLOPE, _FLOOR = np.linspace(-9, 5, 15), np.geomspace(0.5, 8, 7), np.geomspace(1e-4, 0.1, 6)
_STEPS = 300  # of a forecast: a curve over thousands of images needs no more
_FEWEST = 10  # answers from which on the number left is told
_LAPSE = 0.01  # share of the images that a person takes for what they are not


class Look(NamedTuple):
    """An image that was shown to a person."""

    audit: bool  # whether it was drawn at random from all images that had not been shown until then
    dirty: bool | None  # the answer; None while there is none


class Standing(NamedTuple):
    """Where a review stands."""

    total: int  # images in all
    looked: int  # images with an answer
    found: int  # dirty ones among them
    about: float | None  # dirty images left, best estimate; None before ten answers, which tell next to nothing
    at_most: int  # dirty images left, upper bound at the level 0.95, from the audit alone
    audited: int  # images with an answer that were drawn at random
    # whether the wanted share of the dirty images is found: at the level 0.95 by the audit, or with a probability of
    # 0.9 by the forecast
    stop: bool
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


class Forecast(NamedTuple):
    """What the images without an answer are likely to be.

    Attributes:
        about (float): Expected number of dirty ones among them.
        doubt (float): Probability that less than the wanted share of all dirty images is found.
        more (int): Further looks down the order, all clean, that make the doubt small enough; 0 where it is.
    """

    about: float
    doubt: float
    more: int


def forecast(values: np.ndarray, answers: Mapping[int, bool], target: float = RECALL) -> Forecast:
    """Read off the answers how the share of dirty images falls along the order, and sum it over the rest.

    An image of normal score ``z`` in the order is dirty with probability ``f + (1 - f) / (1 + exp(-(a + b z)))``: the
    floor ``f`` is for defects that the order does not see. A person takes 1 % of the images for what they are not. The
    posterior over a grid of ``a``, ``b`` and ``f``, all equally likely before the first answer, and the Poisson number
    that each of them leaves make the forecast: one that trusts the order as far as the answers bear it out. Weights of
    the grid that were fitted to five families of images did no better on the sixth, so there are none; what it is worth
    was measured on these families (`studies/review.py`).

    Args:
        values (np.ndarray): ``[N]``, higher is more suspicious; of an image with an answer, what the others' answers
            say of it, or the answers would bear themselves out.
        answers (Mapping[int, bool]): Whether an image is dirty, by its index.
        target (float): Share of the dirty images to be found.

    References:
        Yang, Lewis and Frieder, "Heuristic stopping rules for technology-assisted review", DocEng 2021 (recall from the
        probabilities of a model, and their uncertainty).
        Wichmann and Hill, "The psychometric function I", Perception & Psychophysics 2001 (floor and lapses).
    """
    rest = np.ones(len(values), dtype=bool)
    rest[list(answers)] = False
    if not rest.any():
        return Forecast(0.0, 0.0, 0)
    z = norm.ppf((rankdata(values) - 0.5) / len(values))
    asked, dirty = z[list(answers)], np.fromiter(answers.values(), dtype=float, count=len(answers))
    base, slope, floor = (axis.reshape(-1, 1) for axis in np.meshgrid(_BASE, _SLOPE, _FLOOR))

    def chance(z: np.ndarray) -> np.ndarray:
        return floor + (1 - floor) * expit(base + slope * z)

    def said_dirty(chance: np.ndarray) -> np.ndarray:
        return chance * (1 - _LAPSE) + (1 - chance) * _LAPSE

    middle, steps = _steps(asked)
    told, bad = said_dirty(chance(middle)), np.array([dirty[step].sum() for step in steps])
    likelihood = np.log(told) @ bad + np.log1p(-told) @ (np.array([len(step) for step in steps]) - bad)
    middle, steps = _steps(z[rest])
    sizes, further = np.array([len(step) for step in steps]), chance(middle)
    if_clean = np.cumsum(np.log1p(-said_dirty(further)) * sizes, axis=1)
    left = (further * sizes)[:, ::-1].cumsum(1)[:, ::-1]
    left = np.pad(left, ((0, 0), (0, 1)))  # none after the last step
    allowed = math.floor(dirty.sum() * (1 - target) / target + 1e-9)

    def outlook(more: int) -> tuple[float, float]:
        """Expected number left and doubt, after so many further steps with clean images only."""
        log = likelihood + (if_clean[:, more - 1] if more else 0)
        weight = np.exp(log - log.max())
        about, doubt = np.stack([left[:, more], pdtrc(allowed, left[:, more])]) @ (weight / weight.sum())
        return float(about), float(doubt)

    about, doubt = outlook(0)
    enough = 0 if doubt <= DOUBT else _first(lambda more: outlook(more)[1] <= DOUBT, len(steps))
    return Forecast(about, doubt, int(sizes[:enough].sum()))


def _steps(z: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Images from the most suspicious down, past 300 in steps of several, and the middle one's ``z`` of each."""
    steps = np.array_split(np.argsort(-z), min(_STEPS, max(len(z), 1)))
    return np.array([z[step[len(step) // 2]] if len(step) else 0.0 for step in steps]), steps


def standing(looks: Sequence[Look], total: int, ahead: Forecast, target: float = RECALL) -> Standing:
    """Where a review stands, and whether it may end.

    Args:
        looks (Sequence[Look]): As for `left_at_most`.
        total (int): Number of images.
        ahead (Forecast): Of the images without an answer; its number is brought inside of what is possible.
        target (float): Share of the dirty images to be found.
    """
    answers = [look.dirty for look in looks if look.dirty is not None]
    looked, found = len(answers), sum(answers)
    audit = _Audit.of(looks, total)
    at_most = audit.left_at_most()
    by_audit = _enough(found, at_most, target)
    share = f"{target:.0%}".replace("%", " %")
    more = 0
    if looked == total:
        reason = "Every image was looked at."
    elif by_audit:
        reason = f"The random images say that at least {share} of the dirty images are found, whatever the order."
    elif looked and ahead.more == 0:
        reason = f"As the answers thin out down the order, at least {share} of the dirty images are likely found."
    else:
        drawn = _first(lambda count: _enough(found, audit.left_at_most(count), target), total - looked)
        more = min(ahead.more or drawn, drawn)
        reason = f"Not yet. If the next {more} images are all clean, at least {share} of the dirty ones are found."
    inside = float(min(max(ahead.about, 0.0), at_most)) if looked >= min(_FEWEST, total) else None
    audited = sum(look.audit and look.dirty is not None for look in looks)
    return Standing(total, looked, found, inside, at_most, audited, more == 0, more, reason)


def _enough(found: int, left: int, target: float) -> bool:
    return found >= target * (found + left) - 1e-9


def _first(holds: Callable[[int], bool], most: int) -> int:
    """Smallest number from 1 to ``most`` for which it holds, as for all above it; ``most`` if for none."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
