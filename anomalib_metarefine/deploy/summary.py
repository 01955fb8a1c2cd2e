"""What `watch` tells people: a summary of a run, and its events in words."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anomalib_metarefine.deploy.detector import DECISIONS

_LATENCIES = 1_000  # of the last images, for the summary


@dataclass
class Summary:
    """What was done since the start.

    Attributes:
        decisions (Counter[str]): Images by decision, those that can't be read as ``"unreadable"``.
        before (int): Images that an earlier run had done.
        events (Counter[str]): Events of drift and threshold.
        latencies (deque[float]): Of the last images, in milliseconds.
        started (float): On the clock of ``time.monotonic``.
    """

    decisions: Counter[str] = field(default_factory=Counter)
    before: int = 0
    events: Counter[str] = field(default_factory=Counter)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        total = self.decisions.total()
        text = f"{total} image{'' if total == 1 else 's'} in {time.monotonic() - self.started:.0f} s"
        for decision in (*DECISIONS, "unreadable"):
            text += f", {self.decisions[decision]} {decision}"
        if self.latencies:
            p50, p95 = np.percentile(self.latencies, [50, 95])
            text += f"; inference p50 {p50:.1f} ms, p95 {p95:.1f} ms"
        for event, count in self.events.items():
            text += f"; {count} {event} event{'s' if count > 1 else ''}"
        return text


def in_words(event: dict[str, Any]) -> str:
    """An event of `Monitor`."""
    if event["event"] == "threshold":
        return f"The threshold moved from {event['old']:.6g} to {event['new']:.6g}: {event['reason']}."
    if not event["drifted"]:
        return f"The drift has ended, at image {event['count']}."
    lower, median, upper = event["quartiles"]
    return (
        f"Warning: scores have drifted {event['direction']} since image {event['since']}: "
        f"median {median:.6g}, quartiles {lower:.6g} and {upper:.6g} of the last {event['images']} images."
    )
