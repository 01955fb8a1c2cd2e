"""Messages of other packages: each once, and none of every operation that an exporter touches."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def log_once() -> None:
    """Leave one console handler where anomalib's command has set up two.

    anomalib 2.7 calls ``logging.basicConfig``, which writes to standard error, and then adds Rich's handler, which
    writes the same record again. Handlers that anybody else has set up are left alone.
    """
    root = logging.getLogger()
    if any(type(handler).__module__ == "rich.logging" for handler in root.handlers):
        for handler in [handler for handler in root.handlers if _is_plain_console(handler)]:
            root.removeHandler(handler)


def _is_plain_console(handler: logging.Handler) -> bool:
    return type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.__stderr__)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Only warnings and errors of some loggers: exporters tell of every operation that they touch."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
