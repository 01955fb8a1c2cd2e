"""The ``metarefine`` command. Nothing heavy is imported before a subcommand runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

from anomalib_metarefine import __version__
from anomalib_metarefine.cli.benchmark import BENCHMARK
from anomalib_metarefine.cli.command import HelpFormatter
from anomalib_metarefine.cli.convert import CONVERT
from anomalib_metarefine.cli.curation import CURATION
from anomalib_metarefine.cli.deployment import DEPLOYMENT
from anomalib_metarefine.cli.doctor import DOCTOR
from anomalib_metarefine.cli.living import LIVING
from anomalib_metarefine.cli.meta import META
from anomalib_metarefine.cli.review import REVIEW
from anomalib_metarefine.cli.train import TRAIN

_COMMANDS = CURATION | REVIEW | CONVERT | TRAIN | DEPLOYMENT | LIVING | BENCHMARK | META | DOCTOR
_DESCRIPTION = """\
Anomaly detection from dirty training folders. Training, testing and export go
through anomalib: `anomalib train --model MetaRefine --data ...`."""
_EXIT_CODES = """\
exit codes:
  0    done, and the answer is yes
  1    done, and the answer is no: curate rejects more than --fail-above, diff
       finds changes, train, verify or doctor finds a problem, convert could not read
       every image, bench could not get every data set
  2    the input can't be used; one line on standard error says why
  130  stopped by Ctrl-C

`metarefine COMMAND --help` lists the options of a command. Completion:
  metarefine --print-completion bash > ~/.local/share/bash-completion/completions/metarefine"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used, 130 after Ctrl-C.
    """
    options = build_parser().parse_args(argv)
    _set_up_messages(options.verbose)
    try:
        with _progress(shown=not options.quiet):
            return _COMMANDS[options.command].run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if options.verbose:
            traceback.print_exc()
        print(f"metarefine: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metarefine: stopped by Ctrl-C.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    import shtab

    parser = _Parser(
        prog="metarefine",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"anomalib-metarefine {__version__}")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script for a shell")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            description=command.description,
            formatter_class=HelpFormatter,
            parents=[_common()],
        )
        command.arguments(added)
        for action in added._actions:  # argparse has no public list of them; shtab reads the same one
            if action.metavar in {"DATA", "SOURCE", "FILE"} or action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


class _Parser(argparse.ArgumentParser):
    """Tells of a wrong command line as of any other input that can't be used."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"metarefine: {message}. See `{self.prog} --help`.\n")


def _common() -> argparse.ArgumentParser:
    """Options of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="no progress; warnings, errors and results are shown")
    group.add_argument("--verbose", action="store_true", help="also what libraries say, and where an error arose")
    return parser


def _progress(shown: bool) -> AbstractContextManager[None]:
    if shown:
        return nullcontext()
    from anomalib_metarefine.progress import no_progress

    return no_progress()


def _set_up_messages(verbose: bool) -> None:
    logging.basicConfig(format="metarefine: %(message)s")
    logging.getLogger("anomalib_metarefine").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:  # what the authors of libraries tell each other
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
