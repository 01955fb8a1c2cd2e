"""Subcommands about a model in use: change it, ask it why, look back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import SHOWN, Command, command_line, require

if TYPE_CHECKING:
    import argparse

_CHECKPOINT, _RESULTS = "a checkpoint of a trained MetaRefine", "the results of `metarefine watch`"


def _update_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help=_CHECKPOINT)
    add("--add", metavar="DATA", help="images to add: folder, CSV or Parquet; they are judged first")
    add("--forget", nargs="+", default=[], metavar="IMAGE", help="training images: path, end of it, or SHA-256")
    add("--verdicts", type=Path, metavar="FILE", help="a person's decisions: a filled-in table, or decisions.csv")
    add("--results", type=Path, metavar="FILE", help="results of a line: the verdicts are about it; replay it")
    add("--reconsider", action="store_true", help="judge all images anew; default: old decisions stand")
    add("--out", required=True, type=Path, metavar="CKPT", help="the updated checkpoint; must not exist")


def _update(options: argparse.Namespace) -> int:
    require(options.checkpoint, _CHECKPOINT)
    for path, expected in ((options.add, "images"), (options.verdicts, "a table"), (options.results, _RESULTS)):
        if path:
            require(path, expected)
    if not (options.add or options.forget or options.verdicts or options.reconsider):
        msg = "There is nothing to do. Pass --add, --forget, --verdicts or --reconsider."
        raise ValueError(msg)
    from anomalib_metarefine.deploy.history import read_results
    from anomalib_metarefine.images.answers import read
    from anomalib_metarefine.images.sources import read_source
    from anomalib_metarefine.model.checkpoints import load_checkpoint
    from anomalib_metarefine.model.replay import read_verdicts, replay
    from anomalib_metarefine.model.update import update_checkpoint

    lines = list(read_results(options.results)) if options.results else []
    rows = read(options.verdicts) if options.verdicts else None
    triples = (
        [] if rows is None else [(row.image_path, row.sha256, row.decision == "keep") for row in rows.itertuples()]
    )
    asked = read_verdicts(load_checkpoint(options.checkpoint), triples, lines)
    source = read_source(options.add) if options.add else None
    found = update_checkpoint(
        options.checkpoint, options.out, [*(source.paths if source else ()), *asked.add],
        [*options.forget, *asked.forget], asked.answers, options.reconsider,
        {str(path): name for path, name in (source.variants or {}).items()} if source else {},
    )  # fmt: skip
    print("\n".join(found.lines()))
    for name, paths in (("defective, but never learned from", asked.noted), ("no longer there", asked.gone)):
        for path in paths:
            print(f"nothing to change, {name}: {path}")
    if lines:
        again = replay(load_checkpoint(options.out), lines, progress=not options.quiet)
        print(f"Replay of {again.images} decisions, {again.rescored} on images scored anew, the others on old scores:")
        for name, paths in (
            ("normal, was anomalous", again.now_normal),
            ("anomalous, was normal", again.now_anomalous),
        ):
            print(f"  {len(paths)} now {name}")
            print("".join(f"    {path}\n" for path in paths[:SHOWN]), end="")
    print(f"Next: {command_line('metarefine', 'export', options.out, '--out', 'DIR')}, then metarefine verify")
    return 0


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help=_CHECKPOINT)
    add("image", metavar="IMAGE", type=Path, help="any image file")
    add("--png", type=Path, metavar="FILE", help="write its heat map with the regions outlined; it is replaced")
    add("--html", type=Path, metavar="FILE", help="write a self-contained page; it is replaced")


def _explain(options: argparse.Namespace) -> int:
    require(options.checkpoint, _CHECKPOINT)
    require(options.image, "an image")
    from anomalib_metarefine.model.checkpoints import load_checkpoint
    from anomalib_metarefine.model.explain import explain

    found = explain(load_checkpoint(options.checkpoint), options.image)
    print("\n".join(found.lines()))
    if options.png:
        picture = found.picture()
        assert picture is not None, "it was read a moment ago"
        picture.save(options.png, "PNG")
    if options.html:
        print(found.write_page(options.html))
    return 0


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", metavar="FILE", type=Path, help=_RESULTS)
    add("--out", type=Path, metavar="HTML", help="page to write; it is replaced; default: beside the results")


def _history(options: argparse.Namespace) -> int:
    require(options.results, _RESULTS)
    from anomalib_metarefine.deploy.history import write_history

    print(write_history(options.results, options.out or options.results.with_suffix(".html")))
    return 0


LIVING = {
    "update": Command(
        "add images to a trained model, make it forget some",
        "Needs none of the old images: the checkpoint remembers their features. The model is the same as a training "
        "from scratch on the changed images, with the same whitening and start, in a fraction of its time.",
        _update_arguments,
        _update,
    ),
    "explain": Command(
        "say why an image has its score",
        "Its worst regions, the training images most like it there, and its score without the worst.",
        _explain_arguments,
        _explain,
    ),
    "history": Command(
        "draw what a line has decided over time",
        "One self-contained page of scores, thresholds, drift and models, from a results file.",
        _history_arguments,
        _history,
    ),
}
