"""A clean stop: what is in flight is finished first."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask to stop; a second one ends the process as usual.

    The handler only sets a flag: it may run in the middle of anything.
    """
    asked = []
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(*_: object) -> None:
        asked.append(True)
        restore()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield lambda: bool(asked)
    finally:
        restore()
