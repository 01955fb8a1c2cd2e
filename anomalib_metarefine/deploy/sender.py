"""Sending results to a receiver that may be away for a while, without holding up anything."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anomalib_metarefine.deploy.outbox import Outbox

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # between tries
_AT_ONCE = 100  # lines
_FAREWELL_S = 10.0  # for what is left when watching ends


class Sink(Protocol):
    """A receiver.

    Attributes:
        name (str): One word; of a kind there can be one.
        target (str): What it is called in messages.
    """

    name: str
    target: str

    def send(self, lines: list[bytes]) -> None:
        """Hand over lines; returns when the receiver has them all, raises whatever it likes if not."""

    def close(self) -> None:
        """End the connection."""


class Sender(threading.Thread):
    """Sends what is in an outbox, line after line, at least once each.

    Args:
        sink (Sink): The receiver.
        outbox (Outbox): What it has not got yet.
        say (Callable[[str], None]): Told of every change: away, and there again.
    """

    def __init__(self, sink: Sink, outbox: Outbox, say: Callable[[str], None]) -> None:
        super().__init__(name=f"send to {sink.name}", daemon=True)
        self.sink, self.outbox, self._say = sink, outbox, say
        self._wake, self._ending = threading.Event(), threading.Event()
        self._away_since: float | None = None
        self._told_missing: set[str] = set()

    def is_up(self) -> bool:
        """Whether the last try went well."""
        return self._away_since is None

    def wake(self) -> None:
        """There may be new lines."""
        self._wake.set()

    def finish(self) -> None:
        """End when all is sent, or a try fails."""
        self._ending.set()
        self._wake.set()

    def run(self) -> None:
        """Send until `finish`."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                busy = self._send()
            except Exception as error:  # whatever is wrong with a receiver, watching goes on
                self._tell_away(error)
                if self._ending.is_set():
                    return
                self._ending.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            pause = _FIRST_PAUSE_S
            if not busy:
                if self._ending.is_set():
                    self.sink.close()
                    return
                self._wake.wait()
                self._wake.clear()

    def left(self) -> int | str:
        """How many lines there are to send."""
        try:
            return self.outbox.waiting()
        except OSError as error:  # of the results' own disk
            return f"not known ({error})"

    def _send(self) -> bool:
        """Send a batch; whether there was one."""
        lines, place = self.outbox.batch()
        for file in self.outbox.missing - self._told_missing:
            self._say(
                "Warning: results that were renamed are not beside the new ones any more. "
                f"What {self.sink.target} had not got of them will not be sent."
            )
            self._told_missing.add(file)
        if place is None:
            return False
        for start in range(0, len(lines), _AT_ONCE):
            self.sink.send(lines[start : start + _AT_ONCE])
        self.outbox.arrived(place)
        if self._away_since is not None:
            away, self._away_since = time.monotonic() - self._away_since, None
            self._say(f"{self.sink.target} is there again after {away:.0f} s. Lines to send: {self.left()}.")
        return True

    def _tell_away(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"Warning: {self.sink.target} takes nothing: {reason}. Lines to send: {self.left()}.")


@contextmanager
def sending(senders: Sequence[Sender], say: Callable[[str], None]) -> Iterator[None]:
    """Send while the block runs, and for a bounded time after it."""
    for sender in senders:
        if sender.outbox.damaged:
            say(f"Warning: where {sender.sink.target} had got to can't be read; it gets the whole results again.")
        sender.outbox.begin()
        sender.start()
    try:
        yield
    finally:
        end = time.monotonic() + _FAREWELL_S
        for sender in senders:
            sender.finish()
        for sender in senders:
            sender.join(max(0.0, end - time.monotonic()))
            if left := sender.left():
                say(f"{sender.sink.target} has not got everything. Lines that the next start will send: {left}.")
