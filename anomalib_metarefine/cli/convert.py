"""Subcommand that makes images readable for everybody."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import SHOWN, Command, require

if TYPE_CHECKING:
    import argparse


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="folder of images, CSV or Parquet with image_path")
    add("--to", type=Path, required=True, metavar="DIR", help="empty or new folder, outside of the images' own")
    add("--bit-depth", type=int, metavar="BITS", help="bits in use of files with more than 8, such as 12")
    add("--extensions", nargs="+", metavar="EXT", help="file names to look for in a folder")


def _convert(options: argparse.Namespace) -> int:
    require(options.data, "a folder of images, or a table of paths")
    from anomalib_metarefine.images.convert import convert

    settings = {"extensions": tuple(options.extensions)} if options.extensions else {}
    written, unreadable = convert(options.data, options.to, options.bit_depth, **settings)
    print(f"{options.to.resolve()}: {len(written)} images. The originals are as they were.")
    if options.bit_depth:
        print(
            f"Train MetaRefine on them with --model.bit_depth {options.bit_depth}: the line's files are then read so."
        )
    for name, reason in list(unreadable.items())[:SHOWN]:
        print(f"metarefine: not converted: {name}: {reason}", file=sys.stderr)
    if len(unreadable) > SHOWN:
        print(f"metarefine: ... and {len(unreadable) - SHOWN} more", file=sys.stderr)
    return 1 if unreadable else 0


CONVERT = {
    "convert": Command(
        "write 8-bit upright RGB copies of images",
        "For images that anomalib's own datamodules would misread: more than 8 bits, turned by an EXIF tag, or "
        "transparent. The copies are PNG files of the same names. Exit code 1 if some images can't be read.",
        _arguments,
        _convert,
    ),
}
