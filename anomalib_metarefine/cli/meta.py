"""Subcommands about meta-training."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import Command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from anomalib_metarefine.refinement.engine import FitSettings


def _landscape_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", metavar="DATA", help="folder of images, CSV or Parquet with image_path, or YAML of a datamodule")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the figure and its numbers")
    add("--root", type=Path, help="what paths in a table are relative to")
    add("--extensions", nargs="+", metavar="EXT", help="file names to look for in a folder")
    add("--backbone", default="tf_efficientnet_lite0", help="timm model for the features")
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="in pixels; default: the shape of the images")
    add("--batch-size", type=int, default=32, help="images at a time in the backbone")
    add("--seed", type=int, default=0, help="of everything random")
    add("--points", type=int, default=21, metavar="N", help="along each axis of the surface, odd")
    add("--radius", type=float, default=1.0, metavar="R", help="how far to look, in lengths of the weights")
    add("--directions", type=int, default=20, metavar="N", help="random ones that sharpness is a mean over")
    add("--patches", type=int, default=4096, metavar="N", help="that the loss is measured on")
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="of MetaRefine, such as meta_steps=100")


def _landscape(options: argparse.Namespace) -> int:
    from anomalib_metarefine.benchmark.landscape import loss_landscape

    names = ["root", "backbone", "batch_size", "seed", "points", "radius", "directions", "patches"]
    asked = {name: getattr(options, name) for name in names}
    asked["image_size"] = tuple(options.image_size) if options.image_size else None
    if options.extensions:
        asked["extensions"] = tuple(options.extensions)
    found = loss_landscape(options.data, settings=_settings(options.settings), **asked)
    written = found.write(options.out)
    print(found.verdict)
    print(f"{options.out.resolve()}: {', '.join(sorted(file.name for file in written))}")
    return 0


def _settings(texts: Sequence[str]) -> FitSettings:
    """``NAME=VALUE`` as settings, each of the type of its default.

    Raises:
        ValueError: If there is no such setting, its value is of another type, or names what does not exist.
    """
    from anomalib_metarefine.meta.algorithms import get_algorithm
    from anomalib_metarefine.meta.maml import get_learner
    from anomalib_metarefine.refinement.engine import FitSettings

    defaults = vars(FitSettings())
    chosen = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in defaults:
            msg = f"--settings is written as NAME=VALUE with a name of {', '.join(defaults)}; found {text!r}."
            raise ValueError(msg)
        kind = type(defaults[name])
        try:
            chosen[name] = kind(value)
        except ValueError as error:
            msg = f"--settings {name} is of type {kind.__name__} (default {defaults[name]}), found {value!r}."
            raise ValueError(msg) from error
    settings = FitSettings(**chosen)
    get_algorithm(settings.meta_algorithm)  # now, not after a pass over the images
    get_learner(settings.meta_backend)
    return settings


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        action="append",
        required=True,
        metavar="DATA[@HxW]",
        help="images of a category, as `metarefine curate` takes them, with height and width in pixels; repeat it",
    )
    add("--out", type=Path, required=True, metavar="CKPT", help="file for `MetaRefine(init_from=...)`")
    add("--backbone", default="tf_efficientnet_lite0", help="timm model for the features")
    add("--seed", type=int, default=0, help="of everything random")
    add("--batch-size", type=int, default=32, help="images at a time in the backbone")
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help="of MetaRefine, such as meta_steps=100")


def _train(options: argparse.Namespace) -> int:
    from anomalib_metarefine.model.initialisation import learn_shared

    if options.out.is_dir():
        msg = f"--out is a file, such as {options.out / 'init.ckpt'}; {options.out} is a folder."
        raise ValueError(msg)
    shared = learn_shared(
        [_category(text) for text in options.data],
        backbone=options.backbone,
        settings=_settings(options.settings),
        seed=options.seed,
        batch_size=options.batch_size,
    )
    shared.save(options.out)
    for category in shared.run["data"]:
        height, width = category["image_size"]
        print(f"{category['source']}: {category['images']} images at {height} x {width} pixels")
    print(f"{options.out}: start from it with `anomalib train --model MetaRefine --model.init_from {options.out}`")
    return 0


def _category(text: str) -> tuple[str, tuple[int, int] | None]:
    """``DATA`` or ``DATA@HxW``."""
    found = re.fullmatch(r"(.+)@(\d+)x(\d+)", text)
    return (found[1], (int(found[2]), int(found[3]))) if found else (text, None)


def _ablation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="CSV", help="rows are added to it; finished ones stay")
    add("--data", nargs="+", required=True, metavar="WHERE[@HxW][:IMAGES][:NAME]", help="e.g. elpv-mono screw:150")
    add("--train-images", type=int, nargs="+", metavar="N", help="sizes of the training set, instead of its own")
    add("--contamination", type=float, nargs="+", default=[0, 0.2, 0.4], metavar="SHARE", help="dirty images")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one training set for each")
    add("--starts", nargs="+", metavar="NAME", help="only these initialisations; default: all")
    add("--refinements", nargs="+", metavar="NAME", help="only these; default: none neighbours likelihood")


def _ablation(options: argparse.Namespace) -> int:
    import pandas as pd

    from anomalib_metarefine.benchmark.ablation import OTHERS, REFINEMENTS, STARTS, run, summarise
    from anomalib_metarefine.benchmark.data_sets import DataSet

    possible = [start for start in STARTS if start != OTHERS or len(options.data) > 1]
    starts, refinements = options.starts or possible, options.refinements or list(REFINEMENTS)
    for option, names, known in (("--starts", starts, STARTS), ("--refinements", refinements, REFINEMENTS)):
        if unknown := [name for name in names if name not in known]:
            msg = f"{option} must be of {', '.join(map(repr, known))}; found {unknown[0]!r}."
            raise ValueError(msg)
    if OTHERS in starts and OTHERS not in possible:
        msg = f"{OTHERS!r} needs at least two data sets, found one: {options.data[0]}."
        raise ValueError(msg)
    data = [DataSet.parse(text) for text in options.data]
    unsized = [data_set.name for data_set in data if data_set.train_images is None]
    if unsized and not options.train_images:
        msg = f"How many training images is {unsized[0]} to have? Write it as WHERE:IMAGES, or give --train-images."
        raise ValueError(msg)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sizes = options.train_images or [None]
    for row in run(options.out, data, sizes, options.contamination, options.seeds, starts, refinements):
        if isinstance(row, str):
            print(row, flush=True)
            continue
        cell = f"{row['data']} {row['train_images']} images, {row['contamination']:.0%} dirty, seed {row['seed']}"
        print(f"{cell}, {row['start']}, {row['refinement']}: image AUROC {row['image_AUROC']:.3f}", flush=True)
    if not options.out.is_file():
        print("metarefine: no training set could be had; see above.", file=sys.stderr)
        return 2
    print(summarise(pd.read_csv(options.out)))
    return 0


META = {
    "ablation": Command(
        "what each way to initialise the flow buys, as a table",
        "Fit and test from every initialisation, with every refinement, on dirty training sets of known contamination. "
        "Finished cells are in the result file and are not repeated. Prints the tables as Markdown.",
        _ablation_arguments,
        _ablation,
    ),
    "meta-train": Command(
        "a meta-learned initialisation over several categories, as a file",
        "Meta-trains the flow on episodes of each category in turn. A new category starts from the result, with "
        "`init_from`, instead of meta-training on its own images.",
        _train_arguments,
        _train,
    ),
    "landscape": Command(
        "the loss before and after meta-training, as a figure and as numbers",
        "Meta-trains on the images, and draws the loss around the initialisation before and after. Writes "
        "landscape.png, landscape.svg and landscape.json, with the mean rise of the loss along random directions and "
        "the largest eigenvalue of its Hessian.",
        _landscape_arguments,
        _landscape,
    ),
}
