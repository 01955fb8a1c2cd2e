"""The ``metarefine`` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anomalib_metarefine import __version__


def build_parser() -> argparse.ArgumentParser:
    """The command line; nothing heavy is imported here, so that ``--help`` is quick."""
    parser = argparse.ArgumentParser(
        prog="metarefine",
        description="Anomaly detection from dirty training folders. Training, testing and export go through anomalib: "
        "`anomalib train --model MetaRefine --data ...`.",
    )
    parser.add_argument("--version", action="version", version=f"anomalib-metarefine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train on contaminated real images: raw, refined and truly clean side by side",
        description="Mixes real defective images into a training set, trains on everything (raw), with refinement "
        "(refined) and on the truly clean part (clean), and reports image AUROC and what refinement found.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for table, pictures and checkpoint")
    demo.add_argument("--cell-type", choices=["mono", "poly", "both"], default="mono", help="ELPV solar cells to use")
    demo.add_argument("--mvtec", type=Path, metavar="DIR", help="use this category folder in MVTec layout, not ELPV")
    demo.add_argument("--image-size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="in pixels")
    demo.add_argument("--contamination", type=float, default=0.2, help="share of dirty training images")
    demo.add_argument("--train-images", type=int, default=300, help="size of the training set")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of everything for each")
    demo.add_argument(
        "--training",
        nargs="+",
        choices=["raw", "refined", "clean"],
        default=["raw", "refined", "clean"],
        help="what to run",
    )
    demo.add_argument("--rule", default="fdr", help="rejection rule: fdr, shorth or iqr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used.
    """
    arguments = build_parser().parse_args(argv)
    from anomalib_metarefine.demo import DemoSettings, run_demo

    options = vars(arguments)
    options.pop("command")
    try:
        run_demo(DemoSettings(**{**options, "image_size": tuple(arguments.image_size)}))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"metarefine: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
