"""The ``metarefine`` command. Nothing heavy is imported before a subcommand runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import sys
import warnings

from anomalib_metarefine import __version__
from anomalib_metarefine.cli.benchmark import BENCHMARK
from anomalib_metarefine.cli.convert import CONVERT
from anomalib_metarefine.cli.curation import CURATION
from anomalib_metarefine.cli.deployment import DEPLOYMENT
from anomalib_metarefine.cli.meta import META
from anomalib_metarefine.cli.review import REVIEW

_COMMANDS = CURATION | REVIEW | CONVERT | DEPLOYMENT | BENCHMARK | META


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used, 130 after Ctrl-C.
    """
    options = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="timm|anomalib")  # of each other
    try:
        return _COMMANDS[options.command].run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"metarefine: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metarefine: stopped by Ctrl-C.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="metarefine",
        description="Anomaly detection from dirty training folders. Training, testing and export go through anomalib: "
        "`anomalib train --model MetaRefine --data ...`.",
    )
    parser.add_argument("--version", action="version", version=f"anomalib-metarefine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in _COMMANDS.items():
        command.arguments(
            commands.add_parser(
                name,
                help=command.summary,
                description=command.description,
                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            )
        )
    return parser
