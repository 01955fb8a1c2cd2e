"""Has the distribution of the scores changed since calibration? A test for streams that never end.

A test that is repeated on every image alarms sooner or later, whatever its level. The monitor here bets instead: for
some quantiles ``Q`` of the reference it bets that the next image lies past ``Q`` with more than the known chance. A bet
is fair, or unfavourable, as long as nothing has changed, so wealth stays small; after a change some bets grow
exponentially. Every image opens new bets (the Shiryaev-Roberts sum), so a change is found as quickly after a million
images as after ten. The sum grows by one an image on average, the stake, and by Doob's inequality its chance ever to
pass ``c`` within ``T`` images is at most ``T / c``, for any distribution of the scores and any number of looks.

The chance of lying past a quantile is itself known from a sample only. Two kinds of bets deal with that:

- *learning*: of n + 1 exchangeable scores the next one is the r-th with probability 1 / (n + 1), so what n reference
  scores and t later ones say of the next is Polya's urn, ``(r + k) / (n + 1 + t)`` with k of the t past the quantile.
  No limit of confidence is needed. They find small changes after a while of unchanged images.
- *anchored*: the upper confidence limit of the chance, by the beta distribution of order statistics. They never get
  used to a line that differs from the reference from the first image on.

What counts as unchanged: independent scores distributed as the reference, and among them any share of defects up to
``defect_rate``, however high they score: nothing looks at how far past a quantile an image lies. (With defects the
learning bets are fair to the second order only; docs/threshold.md has the measured rates.) NumPy and SciPy are needed.

References:
    - Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", 2024,
      arXiv 2203.03532.
    - Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024, arXiv 2010.09686.
    - Vovk, "Testing Randomness Online", Statistical Science, 2021, arXiv 1906.09256 (betting against exchangeability).
    - Wilks, "Determination of Sample Sizes for Setting Tolerance Limits", 1941 (the reference is itself a sample).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from anomalib_metarefine.deploy.bets import Bets

_PATIENCE = 3  # times as long as a drift took to be found must it not be seen, to be over
_QUANTILES = 101
_SAVED = ("count", "since", "direction", "statistic", "quiet", "patience", "learned")
_SAVED_OF_BETS = ("learned_past", "wealth", "run", "start")
_FEWEST_IMAGES = 20


@dataclass(frozen=True)
class DriftState:
    """What the monitor knows after an image."""

    drifted: bool  # whether the scores have changed
    count: int  # images seen
    since: int | None  # number of the image (from 1) from which on the scores are likely to have changed
    statistic: float  # logarithm of the wealth, at least 0; it starts anew whenever it has reached the limit
    # drift begins when the statistic reaches it, and ends when it has not been reached for a window, or for three times
    # as long as it took to find the drift
    limit: float
    direction: Literal["up", "down"] | None  # where the scores went, when they drifted
    images: int  # images in the window, the latest ones
    quartiles: tuple[float, float, float]  # lower quartile, median and upper quartile of the window


@dataclass(frozen=True)
class _Settings:
    reference_quantiles: tuple[float, ...]
    images: int
    window: int
    false_alarm_rate: float
    horizon: int
    defect_rate: float


class DriftMonitor:
    """Follows raw scores, and says when they are no longer distributed as at calibration.

    Memory is constant (the window), and an image takes a tenth of a millisecond.

    Args:
        reference_quantiles (Sequence[float]): 101 quantiles (0, 0.01, ..., 1) of raw scores of normal images.
        images (int): How many images they are of, at least 20. From few images little is known of the quantiles, and
            only large changes can be told.
        window (int): Images that `DriftState.quartiles` are of, and how many must look unchanged for a drift to end.
            Nothing else depends on it.
        false_alarm_rate (float): Largest chance of a false alarm within ``horizon`` images, in (0, 1).
        horizon (int): See there. The expected time to the first false alarm is at least ``horizon / rate``.
        defect_rate (float): Share of defects on the line that is not called drift, in [0, 0.5).

    Raises:
        ValueError: If a setting is out of range, or the reference has no spread.

    Example:
        >>> monitor = DriftMonitor(np.linspace(0, 1, 101), images=1000)
        >>> states = [monitor.update(score) for score in np.random.default_rng(0).uniform(0.3, 1.3, 200)]
        >>> states[-1].drifted, states[-1].direction, states[-1].since
        (True, 'up', 5)
    """

    def __init__(
        self,
        reference_quantiles: Sequence[float],
        images: int,
        window: int = 500,
        false_alarm_rate: float = 0.01,
        horizon: int = 10_000,
        defect_rate: float = 0.05,
    ) -> None:
        quantiles = checked_quantiles(reference_quantiles)
        _check(images >= _FEWEST_IMAGES, "images", f"at least {_FEWEST_IMAGES}", images)
        _check(window >= _FEWEST_IMAGES, "window", f"at least {_FEWEST_IMAGES}", window)
        _check(0 < false_alarm_rate < 1, "false_alarm_rate", "in (0, 1)", false_alarm_rate)
        _check(horizon >= 1, "horizon", "at least 1", horizon)
        _check(0 <= defect_rate < 0.5, "defect_rate", "in [0, 0.5)", defect_rate)
        self._settings = _Settings(quantiles, int(images), int(window), false_alarm_rate, int(horizon), defect_rate)
        # Half of the risk is that the reference is an unlucky sample for the anchored bets, half that the stream is.
        self._bets = Bets.make(quantiles, images, false_alarm_rate / 2, defect_rate)
        self._limit = math.log1p(2 * horizon / false_alarm_rate)
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []  # the same scores
        self._count = 0
        self._learned = 0
        self._learned_past = np.zeros(len(self._bets.odds))
        self._since: int | None = None
        self._direction: Literal["up", "down"] | None = None
        self._statistic = 0.0
        self._quiet = self._patience = 0  # images since wealth last reached the limit, and how many end the drift
        self._restart()

    def _restart(self) -> None:
        self._wealth = np.zeros(len(self._bets.odds))  # log(1 + sum over starts)
        self._run = np.zeros(len(self._bets.odds))  # log of the one best start, and when that was
        self._start = np.full(len(self._bets.odds), self._count + 1)

    @classmethod
    def from_calibration(cls, calibration: Mapping[str, Any], **settings: Any) -> DriftMonitor:  # noqa: ANN401
        """A monitor of what ``metadata.json`` holds under ``calibration``; settings and errors are the class's."""
        missing = {"quantiles", "images", "set_aside"} - set(calibration)
        if missing:
            msg = f"The calibration in metadata.json lacks {', '.join(sorted(missing))}. Export the model again."
            raise ValueError(msg)
        return cls(calibration["quantiles"], calibration["images"] - calibration["set_aside"], **settings)

    def update(self, score: float) -> DriftState:
        """Take in the raw score of one image.

        Args:
            score (float): Finite.

        Returns:
            DriftState: What is known now.

        Raises:
            ValueError: If the score is not finite; nothing is taken in then.
        """
        score = float(score)
        if not math.isfinite(score):
            msg = f"A score must be a finite number, found {score}. Leave images without a score out."
            raise ValueError(msg)
        self._count += 1
        self._slide(score)
        past = self._bets.past(score)
        gain = self._bets.gains(past, self._learned, self._learned_past)
        opened = self._run <= 0
        self._start[opened] = self._count
        self._run = np.where(opened, 0, self._run) + gain
        self._wealth = np.logaddexp(0, self._wealth + gain)
        if self._since is None:
            self._learned += 1
            self._learned_past += past
        self._judge()
        return self.state

    def _slide(self, score: float) -> None:
        self._recent.append(score)
        insort(self._ordered, score)
        if len(self._recent) > self._settings.window:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]

    def _judge(self) -> None:
        self._statistic = float(np.logaddexp.reduce(self._wealth) - math.log(len(self._wealth)))
        if self._statistic >= self._limit:
            if self._since is None:
                best = int(np.argmax(self._wealth))
                self._since = int(self._start[best])
                self._direction = "up" if self._bets.upward[best] else "down"
                self._unlearn(self._count + 1 - self._since)
                # A change that was hard to see must be given as long to show itself again.
                self._patience = max(self._settings.window, _PATIENCE * (self._count + 1 - self._since))
            # Wealth starts anew, and will be back soon if the drift goes on.
            self._quiet = 0
            self._restart()
        elif self._since is not None:
            self._quiet += 1
            if self._quiet >= self._patience:
                self._since = self._direction = None

    def _unlearn(self, images: int) -> None:
        """Forget the latest images, as far as the window goes: they are those of the drift."""
        latest = np.array(self._recent)[-images:]
        self._learned -= len(latest)
        self._learned_past -= self._bets.past(latest).sum(0)

    @property
    def state(self) -> DriftState:
        """What is known after the images so far."""
        return DriftState(
            drifted=self._since is not None,
            count=self._count,
            since=self._since,
            statistic=self._statistic,
            limit=self._limit,
            direction=self._direction,
            images=len(self._ordered),
            quartiles=_quartiles(self._ordered),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, settings included, as JSON can hold it; numbers survive it to the last bit."""
        return {
            "settings": {**asdict(self._settings), "reference_quantiles": list(self._settings.reference_quantiles)},
            "recent": list(self._recent),
            **{name: getattr(self, f"_{name}") for name in _SAVED},
            **{name: getattr(self, f"_{name}").tolist() for name in _SAVED_OF_BETS},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DriftMonitor:
        """The monitor that `to_dict` was called of.

        Raises:
            ValueError: If it is something else, or of a version with other bets.
        """
        try:
            monitor = cls(**content["settings"])
            monitor._recent = deque(np.asarray(content["recent"], float).tolist())
            monitor._ordered = sorted(monitor._recent)
            for name in _SAVED:
                setattr(monitor, f"_{name}", content[name])
            for name in _SAVED_OF_BETS:
                setattr(monitor, f"_{name}", np.array(content[name]))
        except (KeyError, TypeError) as error:
            msg = f"This is not the saved state of a drift monitor ({error!r}). Delete it to start afresh."
            raise ValueError(msg) from error
        bets = monitor._bets.odds.shape
        if any(getattr(monitor, f"_{name}").shape != bets for name in _SAVED_OF_BETS):
            msg = f"The saved state is of {np.size(content['wealth'])} bets, this version has {bets[0]}. "
            raise ValueError(msg + "Delete it to start afresh.")
        return monitor


def _quartiles(ordered: Sequence[float]) -> tuple[float, float, float]:
    """Of sorted scores, by linear interpolation; NaN of none."""
    if not ordered:
        return (math.nan, math.nan, math.nan)

    def at(level: float) -> float:
        position = (len(ordered) - 1) * level
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    return (at(0.25), at(0.5), at(0.75))


def checked_quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """The quantiles, if a change can be told from them; else raises ValueError."""
    quantiles = np.asarray(values, dtype=float)
    if quantiles.shape != (_QUANTILES,) or not np.isfinite(quantiles).all() or (np.diff(quantiles) < 0).any():
        msg = f"reference_quantiles must be {_QUANTILES} finite numbers in rising order, found {_describe(quantiles)}."
        raise ValueError(msg)
    if quantiles[25] == quantiles[75]:
        msg = f"Half of the reference scores are {quantiles[50]:.6g}: no change can be told. Calibrate on other images."
        raise ValueError(msg)
    return tuple(quantiles.tolist())


def _describe(quantiles: np.ndarray) -> str:
    if quantiles.shape != (_QUANTILES,):
        return f"shape {quantiles.shape}"
    if not np.isfinite(quantiles).all():
        return f"{int((~np.isfinite(quantiles)).sum())} that are not finite"
    return f"a fall at {int(np.argmax(np.diff(quantiles) < 0)) + 1}"


def _check(fine: bool, name: str, expected: str, found: float) -> None:
    if not fine:
        msg = f"{name} must be {expected}, found {found}."
        raise ValueError(msg)
