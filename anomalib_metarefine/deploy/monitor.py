"""What the decision about an image owes to the images before it: the drift monitor and the moving threshold.

All of it follows from the raw scores in their order. So it survives `kill -9` without a file of its own: the last saved
state is in the results file, and the scores behind it are gone through again.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_metarefine.deploy.drift import DriftMonitor, DriftState, checked_quantiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anomalib_metarefine.deploy.detector import Detector


@dataclass(frozen=True)
class ThresholdMove:
    """One move of the threshold.

    Attributes:
        count (int): Number of the image after which it moved.
        old (float): Raw threshold before.
        new (float): Raw threshold from the next image on.
        reason (str): Why, for the log.
        limited (bool): Whether a limit stopped it.
    """

    count: int
    old: float
    new: float
    reason: str
    limited: bool


class DynamicThreshold:
    """Moves the threshold with the window's median and inter-quartile range, within limits, while scores drift.

    The rule is ``median + factor * (Q3 - Q1)``, with the factor by which the calibrated threshold stands above the
    reference. The threshold moves only if the monitor says that scores have drifted, and the whole window is from after
    that; at most once a window; and by more than three standard deviations of the rule's scatter between windows of
    one distribution. It goes back to the calibrated one when the drift ends. Every move is returned.

    It follows whatever more than a quarter of the images do, defects included: that is what the limits are for.

    Args:
        threshold (float): Calibrated, raw.
        limits (tuple[float, float]): Lowest and highest raw threshold allowed, around the calibrated one.
        reference_quantiles (Sequence[float]): As of the monitor.
        window (int): As of the monitor.

    Raises:
        ValueError: If the limits do not hold the threshold, or the reference has no spread.
    """

    def __init__(
        self,
        threshold: float,
        limits: tuple[float, float],
        reference_quantiles: Sequence[float],
        window: int = 500,
    ) -> None:
        low, high = map(float, limits)
        if not low <= threshold <= high:
            msg = f"Limits must hold the calibrated threshold {threshold:.6g}, found {low:.6g} to {high:.6g}."
            raise ValueError(msg)
        quantiles = checked_quantiles(reference_quantiles)
        lower, median, upper = quantiles[25], quantiles[50], quantiles[75]
        self.calibrated = self.threshold = float(threshold)
        self._limits = (low, high)
        self._window = int(window)
        self._factor = (threshold - median) / (upper - lower)
        # Windows drawn from the reference, with a seed of their own: how far does the rule move for no reason, in
        # inter-quartile ranges? The threshold is of one window already, so the difference is of two.
        drawn = np.random.default_rng(0).uniform(0, 100, (400, self._window))
        windows = np.quantile(np.interp(drawn, np.arange(len(quantiles)), quantiles), [0.25, 0.5, 0.75], axis=1)
        self._least = 3 * math.sqrt(2) * float(np.std(self._rule(windows))) / (upper - lower)
        self._moved_at = 0

    def _rule(self, quartiles: Sequence[float] | np.ndarray) -> float | np.ndarray:
        lower, median, upper = quartiles
        return median + self._factor * (upper - lower)

    def update(self, state: DriftState) -> ThresholdMove | None:
        """What the latest state of the monitor does to the threshold; ``None`` if nothing."""
        if not state.drifted or state.since is None:
            wanted, reason = self.calibrated, "drift has ended, back to the calibrated threshold"
            limited = False
        else:
            begin = max(state.since, self._moved_at + 1)
            if state.images < self._window or state.count - begin + 1 < self._window:
                return None
            followed = float(self._rule(state.quartiles))
            lower, median, upper = state.quartiles
            if abs(followed - self.threshold) <= self._least * (upper - lower):
                return None
            wanted = min(max(followed, self._limits[0]), self._limits[1])
            limited = wanted != followed
            reason = (
                f"scores drifted {state.direction} since image {state.since}: median {median:.4g}, quartiles "
                f"{lower:.4g} and {upper:.4g} of the last {state.images}"
                + (", stopped by the limit" if limited else "")
            )
        if wanted == self.threshold:
            return None
        move = ThresholdMove(state.count, self.threshold, wanted, reason, limited)
        self.threshold, self._moved_at = wanted, state.count
        return move

    def to_dict(self) -> dict[str, Any]:
        """What changes, as JSON can hold it."""
        return {"threshold": self.threshold, "moved_at": self._moved_at}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave; one with other limits may pull the threshold to the nearest of them."""
        self.threshold = min(max(float(content["threshold"]), self._limits[0]), self._limits[1])
        self._moved_at = int(content["moved_at"])


class Monitor:
    """Drift and threshold along a stream.

    Args:
        detector (Detector): Its calibration is the reference; without one there is no monitor.
        drift (dict[str, Any] | None): Settings of `DriftMonitor`; ``None`` switches it off.
        limits (tuple[float, float] | None): Raw scores that the threshold may move between; ``None`` keeps it fixed.

    Attributes:
        drifted (bool | None): Whether the scores have drifted; ``None`` without a monitor.

    Raises:
        ValueError: If the threshold is to move, and there is no monitor, or the limits do not hold the threshold.
    """

    def __init__(
        self, detector: Detector, drift: dict[str, Any] | None = None, limits: tuple[float, float] | None = None
    ) -> None:
        calibration = detector.calibration if drift is not None else None
        settings = drift or {}
        self._drift = DriftMonitor.from_calibration(calibration, **settings) if calibration else None
        self._fixed = detector.threshold
        self._moving: DynamicThreshold | None = None
        self.drifted: bool | None = False if self._drift else None
        if limits is not None:
            if self._drift is None or calibration is None or detector.threshold is None:
                msg = (
                    "The threshold moves with the drift monitor. It needs a model with a calibration in metadata.json, "
                )
                msg += "and must not be switched off."
                raise ValueError(msg)
            window = {key: value for key, value in settings.items() if key == "window"}
            self._moving = DynamicThreshold(detector.threshold, limits, calibration["quantiles"], **window)

    @property
    def threshold(self) -> float | None:
        """Raw threshold for the next image."""
        return self._moving.threshold if self._moving else self._fixed

    def update(self, raw_score: float | None) -> list[dict[str, Any]]:
        """Take note of an image's score.

        Args:
            raw_score (float | None): ``None`` changes nothing.

        Returns:
            list[dict[str, Any]]: Events: drift that began or ended, a threshold that moved.
        """
        if raw_score is None or self._drift is None:
            return []
        events = []
        state = self._drift.update(raw_score)
        if state.drifted != self.drifted:
            self.drifted = state.drifted
            events.append({"event": "drift", **asdict(state)})
        move = self._moving.update(state) if self._moving else None
        if move is not None:
            events.append({"event": "threshold", **asdict(move)})
        return events

    def to_dict(self) -> dict[str, Any]:
        """All state, for JSON."""
        return {
            "drift": self._drift.to_dict() if self._drift else None,
            "threshold": self._moving.to_dict() if self._moving else None,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from the saved state of a monitor with the same settings.

        Raises:
            ValueError: If another version wrote it.
        """
        if self._drift:
            self._drift = DriftMonitor.from_dict(saved["drift"])
            self.drifted = self._drift.state.drifted
        if self._moving:
            self._moving.restore(saved["threshold"])


class Recovery:
    """Brings a monitor to where it was, from the records of the results file.

    Args:
        run (dict[str, Any]): What the monitor depends on: the model and the settings. Scores of another run say nothing
            about this one.
    """

    def __init__(self, run: dict[str, Any]) -> None:
        self._run, self._same = run, False
        self._state: dict[str, Any] | None = None
        self._scores: list[float] = []
        self._events = 0

    def take(self, record: dict[str, Any]) -> None:
        """Go through a record."""
        event = record.get("event")
        if event == "start":
            same = all(record.get(key) == value for key, value in self._run.items())
            if not same:
                self._forget()
            self._same = same
        elif not self._same:
            return
        elif event == "state":
            self._forget()
            self._state = record.get("monitor")
        elif event in ("drift", "threshold"):
            self._events += 1
        elif record.get("raw_score") is not None:
            self._scores.append(record["raw_score"])

    def apply(self, monitor: Monitor) -> list[dict[str, Any]]:
        """Restore the monitor.

        Returns:
            list[dict[str, Any]]: Events that were not written any more: the process was killed before.
        """
        if self._state is not None:
            monitor.restore(self._state)
        events = [event for score in self._scores for event in monitor.update(score)]
        return events[self._events :]

    def _forget(self) -> None:
        self._state = None
        self._scores = []
        self._events = 0
