"""What the decision about an image owes to the images before it: the drift monitor and the moving threshold.

All of it follows from the raw scores in their order. So it survives `kill -9` without a file of its own: the last saved
state is in the results file, and the scores behind it are gone through again.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from anomalib_metarefine.deploy.drift import DriftMonitor, DynamicThreshold

if TYPE_CHECKING:
    from anomalib_metarefine.deploy.detector import Detector


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
