"""What a subcommand is."""

from __future__ import annotations

from dataclasses import dataclass
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
