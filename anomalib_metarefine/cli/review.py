"""The subcommand for a person's review."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import Command, require
from anomalib_metarefine.cli.curation import MANIFEST
from anomalib_metarefine.cli.curation import review as table
from anomalib_metarefine.cli.curation import review_arguments as table_arguments

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

_NEEDED = ("starlette", "uvicorn")


def _arguments(parser: argparse.ArgumentParser) -> None:
    table_arguments(parser)
    add = parser.add_argument
    add("--table", action="store_true", help="no page: write the review queue as a table to fill in")
    add("--port", type=int, default=0, help="of the page; 0 takes a free one")
    add("--host", default="127.0.0.1", help="address to listen on; others than this machine's own let others in")
    add("--no-browser", dest="browser", action="store_false", help="only print the address")
    add("--by", default="", metavar="NAME", help="who answers, for the record; the user's name if not given")


def _review(options: argparse.Namespace) -> int:
    require(options.manifest, MANIFEST)
    if options.manifest.suffix == ".jsonl":
        options.manifest = _folder_of_results(options.manifest)
    if options.table or options.decisions or options.out or options.budget is not None:
        return table(options)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The review page needs {' and '.join(missing)}: pip install 'anomalib-metarefine[review]'.")
        print("Without it, here is a table to fill in.")
        return table(options)
    from anomalib_metarefine.curation.review.serving import serve
    from anomalib_metarefine.curation.review.session import Session

    folder = options.manifest if options.manifest.is_dir() else options.manifest.parent
    session = Session(folder, options.by)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        warning = "metarefine: everybody who can reach %s and knows the address below sees the images and can answer."
        print(warning % options.host, file=sys.stderr)

    def opened(address: str) -> None:
        print(
            f"Review of {len(session.images)} images: {address}\nCtrl-C ends it; every answer is on the disk.",
            flush=True,
        )
        if options.browser:
            import webbrowser

            webbrowser.open(address)

    serve(session, options.host, options.port, opened)
    state = session.standing()
    print(f"Looked at {state.looked} of {state.total}, found {state.found}, at most {state.at_most} left (95 %).")
    print(state.reason)
    if state.looked:
        from anomalib_metarefine.curation.review.finish import next_commands

        print("Next, with the answers taken over:", *next_commands(folder), sep="\n  ")
    return 0


_TOOLS = ["coco", "cvat", "fiftyone", "label-studio"]


def _share_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", type=Path, help="manifest.csv, or its folder")
    add("file", metavar="FILE", type=Path, help="to write or to read; a folder for fiftyone")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=_TOOLS, help="write decisions and scores for this tool")
    way.add_argument("--from", dest="source", choices=_TOOLS, help="take over a person's decisions from this tool")


def _share(options: argparse.Namespace) -> int:
    require(options.manifest, MANIFEST)
    if options.source:
        require(options.file, f"what {options.source} has saved")
    from anomalib_metarefine.curation.manifest import Manifest
    from anomalib_metarefine.curation.review.finish import finish
    from anomalib_metarefine.curation.share import FIFTYONE_LINES, LABEL_STUDIO_VIEW, read, write

    folder = options.manifest if options.manifest.is_dir() else options.manifest.parent
    if options.source:
        decisions = read(Manifest.read(folder), options.file, options.source)
        manifest = finish(folder, decisions)
        print(f"{len(decisions)} answers taken over. {manifest.verdict}")
        return 0
    manifest = Manifest.read(folder)
    print(write(manifest, options.file, options.to))
    if options.to == "label-studio":
        print(f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT must be {manifest.root}, and the labeling interface:")
        print(f"  {LABEL_STUDIO_VIEW}")
    if options.to == "fiftyone":
        out = options.file.resolve()
        back = out.with_name(f"{out.name}-back")
        print(f"In Python with FiftyOne, to look, to change decisions, and to hand them back in {back}:")
        print(FIFTYONE_LINES.format(folder=str(out), back=str(back)))
    return 0


def _folder_of_results(results: Path) -> Path:
    """A folder beside the results of a line, for the page and the answers; brought up to date if it is there."""
    from anomalib_metarefine.curation.line_results import manifest_of
    from anomalib_metarefine.deploy.history import read_results

    folder = results.with_name(f"{results.stem}-review")
    manifest = manifest_of(read_results(results))
    manifest.run["results"] = str(results.resolve())
    manifest.write(folder)
    return folder


REVIEW = {
    "share": Command(
        "decisions and scores to and from COCO, CVAT, FiftyOne and Label Studio",
        "Writes all images with decision and score, or takes over what a person changed there.",
        _share_arguments,
        _share,
    ),
    "review": Command(
        "look at the most suspicious images in a local web page, and know when to stop",
        "Opens a page on this machine: the most suspicious images first, chosen anew from every answer, and a few "
        "drawn at random, which tell how many dirty ones are left. Answers go to decisions.csv in the folder at once. "
        "With --table, --budget or --out: a table to fill in; with --decisions, it is taken over.",
        _arguments,
        _review,
    ),
}
