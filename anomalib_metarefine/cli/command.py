"""What a subcommand is."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.images.storage import located

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any, once: the line of a setting holds its own."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = "default:" in (action.help or "")
        plain = told or action.default is None or action.default == [] or isinstance(action.default, bool)
        return action.help if plain else super()._get_help_string(action)


def backbone_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that passes images through the backbone can be told."""
    add = parser.add_argument
    add("--backbone", default="tf_efficientnet_lite0", help="timm model for the features")
    add("--seed", type=int, default=0, help="of everything random")
    add("--batch-size", type=int, default=32, help="images at a time in the backbone")


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Where passes over images run."""
    add = parser.add_argument
    add("--engine", choices=["local", "joblib", "ray"], default="local", help="where it runs; decisions are the same")
    add("--workers", type=int, metavar="N", help="of joblib or Ray; default: one for each core or GPU")
    add("--address", metavar="ADDRESS", help="of a Ray cluster, or auto; default: Ray on this machine")
    add("--gpus-per-worker", type=float, default=0, metavar="G", help="of Ray, such as 1 or 0.5")
    add("--work", type=Path, metavar="DIR", help="folder for features, seen by all workers; a killed run goes on there")


def place(text: str) -> Path:
    """A path or an address, as an argument."""
    try:
        return located(text)
    except (ModuleNotFoundError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


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


def show(table: pd.DataFrame, columns: list[str], limit: int = SHOWN) -> None:
    """The first rows on the screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*(column.replace("_", " ") for column in columns))
    for row in table[columns].head(limit).itertuples(index=False):
        # Text: in a file name, square brackets are no markup.
        shown.add_row(*(Text(f"{cell:.2f}" if isinstance(cell, float) else str(cell), overflow="fold") for cell in row))
    Console().print(shown)
    if len(table) > limit:
        print(f"... and {len(table) - limit} more")
