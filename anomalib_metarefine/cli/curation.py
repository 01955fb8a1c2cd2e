"""Subcommands about training images."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_metarefine.cli.command import (
    Command,
    backbone_arguments,
    command_line,
    engine_arguments,
    place,
    require,
    show,
)
from anomalib_metarefine.images.storage import is_remote
from anomalib_metarefine.settings import Settings, parse_settings, setting_help, setting_names

if TYPE_CHECKING:
    import argparse

    from anomalib_metarefine.curation.evidence import Evidence
    from anomalib_metarefine.curation.manifest import Manifest

MANIFEST = "manifest.csv of a curation, or its folder"
_MOST_CHANGES = 500  # on the screen


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), help="folder for table, pictures and checkpoint")
    add("--cell-type", choices=["mono", "poly", "both"], default="mono", help="ELPV solar cells to use")
    add("--mvtec", type=Path, metavar="DIR", help="use this category folder in MVTec layout, not ELPV")
    add("--image-size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="in pixels")
    add("--contamination", type=float, default=0.2, help="share of dirty training images")
    add("--train-images", type=int, default=300, help="size of the training set")
    add("--seeds", type=int, nargs="+", default=[0], help="one run of everything for each")
    kinds = ["raw", "refined", "clean"]
    add("--training", nargs="+", choices=kinds, default=kinds, help="what to run")
    add("--rule", default=Settings.rule, help=setting_help("rule"))


def _demo(options: argparse.Namespace) -> int:
    for part in ("train/good", "test/good") if options.mvtec else ():
        require(options.mvtec / part, f"a category in MVTec layout, as {options.mvtec} is said to be")
    Settings(rule=options.rule)
    from anomalib_metarefine.demo import DemoSettings, run_demo

    names = ["out", "cell_type", "mvtec", "contamination", "train_images", "seeds", "training", "rule"]
    settings = {name: getattr(options, name) for name in names}
    run_demo(DemoSettings(**settings, image_size=tuple(options.image_size)))
    return 0


def _curate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="folder or zip of images, also at s3:// and the like; CSV, Parquet or YAML")
    add("--out", type=place, required=True, metavar="DIR", help="folder for manifest, report and the rest")
    add("--root", type=Path, help="what paths in a table are relative to")
    add("--extensions", nargs="+", metavar="EXT", help="file names to look for in a folder")
    backbone_arguments(parser)
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="in pixels; default: the shape of the images")
    add("--rule", help=setting_help("rule"))
    add("--rounds", metavar="N", help=setting_help("rounds"))
    names = ", ".join(setting_names())
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help=f"such as shrinkage=0.1; NAME is of {names}")
    add("--bit-depth", type=int, metavar="BITS", help="bits in use of files with more than 8, such as 12")
    add("--ignore", type=Path, metavar="FILE", help="regions to ignore: a picture, black there, or polygons")
    add("--decisions", type=Path, metavar="CSV", help="a person's decisions")
    add("--manifest", choices=["csv", "parquet"], default="csv", help="parquet for millions of images (needs pyarrow)")
    add("--no-quality", dest="quality", action="store_false", help="skip the search for duplicates, blur and the like")
    add("--fail-above", type=float, metavar="SHARE", help="exit code 1 if a larger share of the images is rejected")
    engine_arguments(parser)


def _curate(options: argparse.Namespace) -> int:
    if options.fail_above is not None and not 0 <= options.fail_above <= 1:
        msg = f"--fail-above must be a share in [0, 1], found {options.fail_above:g}."
        raise ValueError(msg)
    require(options.data, "a folder of images, a table of paths, or the YAML of a datamodule")
    if options.manifest == "parquet" and find_spec("pyarrow") is None:
        msg = "--manifest parquet needs pyarrow. Run `pip install 'anomalib-metarefine[parquet]'`."
        raise ModuleNotFoundError(msg)
    if options.decisions and is_remote(options.out):
        msg = f"Decisions are remembered in a folder of this machine, not in {options.out}. Pass one as --out."
        raise ValueError(msg)
    refinement = _settings(options)
    from anomalib_metarefine.curation.decisions import remember
    from anomalib_metarefine.curation.run_folder import locked
    from anomalib_metarefine.images.answers import load, read

    given = read(options.decisions) if options.decisions else None
    with locked(options.out):  # before minutes are spent
        load(options.out)
        from anomalib_metarefine.curation.curate import curate

        names = ["root", "backbone", "seed", "batch_size", "quality", "bit_depth", "ignore"]
        names += ["engine", "workers", "address", "gpus_per_worker", "work"]
        settings = {name: getattr(options, name) for name in names}
        settings["image_size"] = tuple(options.image_size) if options.image_size else None
        if options.extensions:
            settings["extensions"] = tuple(options.extensions)
        decisions = [options.out] if given is None else [options.out, options.decisions]  # the last one wins
        curation = curate(options.data, decisions=decisions, **settings, **refinement)
        if given is not None:
            remember(options.out, curation.manifest, given)
        curation.write(options.out, parquet=options.manifest == "parquet")
    print(curation.manifest.verdict)
    if curation.evidence.unusual_in:
        count = len(curation.evidence.unusual_in)
        print(f"In {count} image{'s' * (count != 1)} some places look unusual. To have them replaced, in copies:")
        print(f"  {command_line('metarefine', 'apply', options.out)} --to DIR --mode repair")
    written = sorted(file.name for file in options.out.iterdir() if not file.name.startswith("."))
    print(f"{options.out.resolve()}: {', '.join(written)}")
    if is_remote(options.out):
        print(f"Next: {command_line('metarefine', 'apply', options.out, '--to', 'DIR', '--mode', 'copy')}")
    else:
        from anomalib_metarefine.curation.review.finish import next_commands

        print(f"Next: {command_line('metarefine', 'review', options.out)}, then {next_commands(options.out)[0]}")
    share = curation.manifest.counts["reject"] / len(curation.manifest.table)
    if options.fail_above is not None and share > options.fail_above:
        print(f"metarefine: {share:.1%} rejected, more than --fail-above {options.fail_above:.1%}", file=sys.stderr)
        return 1
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given; ``--rule`` and ``--rounds`` are two of them with a name of their own."""
    own = {"rule": options.rule, "rounds": options.rounds}
    items = [*options.settings, *(f"{name}={value}" for name, value in own.items() if value is not None)]
    settings = parse_settings(items)
    return {name: getattr(settings, name) for name in (item.partition("=")[0].strip() for item in items)}


def review_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the review by a table."""
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", type=Path, help="manifest.csv, or its folder; or a .jsonl of `watch`")
    add("--decisions", type=Path, metavar="CSV", help="image_path or sha256, and decision: keep or reject")
    add("--budget", type=int, metavar="K", help="ask about the K images with the highest scores, not the review queue")
    add("--out", type=Path, metavar="CSV", help="the table to fill in; default: to_review.csv beside the manifest")


def review(options: argparse.Namespace) -> int:
    """Take over a person's decisions from a table, or write one to fill in."""
    from anomalib_metarefine.curation.manifest import Manifest
    from anomalib_metarefine.curation.questions import template
    from anomalib_metarefine.curation.review.finish import finish
    from anomalib_metarefine.images.answers import read
    from anomalib_metarefine.images.tables import table_text

    manifest = Manifest.read(options.manifest)
    folder = _folder(options.manifest)
    asks = options.out or options.budget is not None or not options.decisions
    out = options.out or folder / "to_review.csv"
    if asks and out.exists():
        msg = f"{out} exists, and may hold your answers. Pass it as --decisions, or another file as --out."
        raise ValueError(msg)
    if options.decisions:
        decisions = read(options.decisions)
        manifest = finish(folder, decisions)
        counts = decisions.decision.value_counts()
        taken = f"Taken over: {counts.get('keep', 0)} keep, {counts.get('reject', 0)} reject"
        print(f"{taken}; remembered in {folder / 'decisions.csv'}.")
        print("To have the other images decided anew in their light: metarefine curate, into the same folder.")
    print(manifest.verdict)
    if not asks:
        return 0
    table = template(manifest, options.budget)
    if table.empty:
        print("There is nothing to ask about; no file was written.")
        return 0
    out.write_text(table_text(table), encoding="utf-8")
    show(table, ["image_path", "decision_so_far", "score", "reason"])
    print(f"Fill in the column decision (keep or reject) of {out}, then run:")
    print(f"  {command_line('metarefine', 'review', options.manifest, '--decisions', out)}")
    return 0


def _apply_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("manifest", metavar="MANIFEST", type=place, help="manifest.csv, or its folder")
    add("--to", type=Path, required=True, metavar="DIR", help="empty or new folder, outside of the images' own")
    modes = ["symlink", "copy", "repair", "list"]
    add("--mode", choices=modes, default="symlink", help="links, copies, copies without unusual regions, or lists")
    add("--review", choices=["separate", "keep", "reject"], default="separate", help="where images for review go")
    add("--root", type=Path, metavar="DIR", help="where the images lie now, if they were moved")


def _apply(options: argparse.Namespace) -> int:
    require(options.manifest, MANIFEST)
    from anomalib_metarefine.curation.apply import REPAIRS_FILE, apply
    from anomalib_metarefine.curation.manifest import Manifest
    from anomalib_metarefine.curation.review.finish import anomalib_command, finish
    from anomalib_metarefine.images.answers import load

    if load(_folder(options.manifest)):  # answers since the manifest was written
        finish(_folder(options.manifest))
    manifest = Manifest.read(options.manifest, options.root)
    evidence = _evidence(_folder(options.manifest)) if options.mode == "repair" else None
    applied = apply(manifest, options.to, options.mode, options.review, progress=True, evidence=evidence)
    counts = ", ".join(f"{count} {name}" for name, count in applied.counts.items())
    print(f"{options.to.resolve()}: {counts}. The originals are as they were.")
    if options.mode == "repair":
        print(f"{applied.repaired} images were repaired: {options.to.resolve() / REPAIRS_FILE} says where.")
    if applied.left_out:
        print(f"Not copied, as they can't be read: {', '.join(applied.left_out)}")
    if options.mode != "list":
        print("To train on what is kept, and test on what is rejected:")
        print(f"  {anomalib_command(applied.counts, options.to.resolve())}")
    return 0


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A", type=place, help="manifest.csv, or its folder")
    parser.add_argument("after", metavar="B", type=place, help="the later one")
    parser.add_argument("--out", metavar="CSV", type=Path, help="a table of all changes; the screen shows 500")


def _diff(options: argparse.Namespace) -> int:
    require(options.before, MANIFEST)
    require(options.after, MANIFEST)
    from anomalib_metarefine.curation.diff import diff
    from anomalib_metarefine.curation.manifest import Manifest
    from anomalib_metarefine.images.tables import table_text

    changes = diff(Manifest.read(options.before), Manifest.read(options.after))
    if changes.empty:
        print("The same images, and the same decisions.")
        return 0
    if options.out is not None:
        options.out.write_text(table_text(changes), encoding="utf-8")
    show(changes, list(changes.columns), limit=_MOST_CHANGES)
    return 1


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", metavar="MANIFEST", type=place, help="manifest.csv, or its folder")


def _report(options: argparse.Namespace) -> int:
    require(options.manifest, MANIFEST)
    from anomalib_metarefine.curation.manifest import Manifest

    print(_write(_folder(options.manifest), Manifest.read(options.manifest)))
    return 0


def _write(folder: Path, manifest: Manifest) -> Path:
    """The manifest, and a report that says the same."""
    from anomalib_metarefine.curation.curate import Curation

    return Curation(manifest, _evidence(folder)).write(folder)


def _evidence(folder: Path) -> Evidence:
    from anomalib_metarefine.curation.evidence import Evidence
    from anomalib_metarefine.curation.run_folder import EVIDENCE_FILE

    return Evidence.load(folder / EVIDENCE_FILE)


def _folder(manifest: Path) -> Path:
    """Where the other files of a curation lie."""
    return manifest if manifest.is_dir() else manifest.parent


CURATION = {
    "demo": Command(
        "train on contaminated real images: raw, refined and truly clean side by side",
        "Mixes real defective images into a training set, trains on everything (raw), with refinement (refined) and on "
        "the truly clean part (clean), and reports image AUROC and what refinement found.",
        _demo_arguments,
        _demo,
    ),
    "curate": Command(
        "find the dirty images of a training set",
        "Decides about every image: keep, reject or review. Writes manifest.csv, run.json, evidence.npz, report.html.",
        _curate_arguments,
        _curate,
    ),
    "apply": Command(
        "sort the images into keep, reject and review",
        "Makes folders of links or copies, or lists of paths, after the answers of a review are taken over. With "
        "--mode repair, what looks unusual in images that are not rejected is replaced by the same place of another "
        "image. The originals are never touched. After an interruption it goes on where it stopped.",
        _apply_arguments,
        _apply,
    ),
    "diff": Command(
        "compare two manifests",
        "Images with another decision, added or removed. Exit code 0 if there are none, else 1.",
        _diff_arguments,
        _diff,
    ),
    "report": Command(
        "write report.html anew",
        "From the manifest and its evidence, with the report of this version.",
        _report_arguments,
        _report,
    ),
}
