"""What a subcommand is."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SHOWN = 20  # rows of a table on the screen; files hold all


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary (str): One line for ``metarefine --help``.
        description (str): For its own ``--help``.
        arguments (Callable): Adds its arguments to its parser.
        run (Callable): Does it, and answers the exit code. What it raises for bad input is shown by `main`.
    """

    summary: str
    description: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def command_line(*parts: str | Path) -> str:
    """A command to copy into a shell, whatever is in its file names.

    Example:
        >>> command_line("metarefine", "report", Path("line 7"))
        "metarefine report 'line 7'"
    """
    texts = [str(part) for part in parts]
    return subprocess.list2cmdline(texts) if sys.platform == "win32" else shlex.join(texts)


def require(path: str | Path, expected: str) -> None:
    """Raise a ``FileNotFoundError`` if there is nothing at a path: before the seconds that heavy imports take."""
    if "://" not in str(path) and not Path(path).expanduser().exists():
        msg = f"There is no {path}. Expected {expected}."
        raise FileNotFoundError(msg)
