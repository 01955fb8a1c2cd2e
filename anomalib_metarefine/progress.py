"""How progress is shown: bars on a terminal, else a line every few seconds. Standard output stays free for results."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_EVERY_S = 5.0  # seconds between lines
_SHOWN = ContextVar("shown", default=True)
_Item = TypeVar("_Item")


class _Lines(Progress):
    """A plain line about the newest task every few seconds, also while nothing moves on."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._tell, daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def _tell(self) -> None:
        seconds = 0.0
        while not self._ended.wait(_EVERY_S):
            seconds += _EVERY_S
            task = self.tasks[-1] if self.tasks else None
            done = f": {task.completed:.0f} of {task.total:.0f}" if task and task.total else ""
            print(
                f"{task.description if task else 'working'}{done}, {seconds:.0f} s", file=self.console.file, flush=True
            )


@contextmanager
def no_progress() -> Iterator[None]:
    """Show none inside, whoever asks for it."""
    token = _SHOWN.set(False)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def progress_bars(enabled: bool) -> Progress:
    """Bars with counts and the time left; where standard error is no terminal, lines."""
    console = Console(stderr=True)
    enabled = enabled and _SHOWN.get()
    if enabled and not console.is_terminal:
        return _Lines(console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not enabled)


def track(items: Sequence[_Item], description: str, enabled: bool = True) -> Iterator[_Item]:
    """The items one by one, with their progress."""
    with progress_bars(enabled) as bars:
        task = bars.add_task(description, total=len(items))
        for item in items:  # not `Progress.track`, which updates only what is live on a terminal
            yield item
            bars.advance(task)
