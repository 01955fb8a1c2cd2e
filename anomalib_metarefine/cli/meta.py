"""Subcommands about meta-training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import Command, backbone_arguments, command_line, require
from anomalib_metarefine.settings import parse_settings, setting_names

if TYPE_CHECKING:
    import argparse


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
    backbone_arguments(parser)
    names = ", ".join(setting_names("density", "meta"))
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help=f"such as meta_steps=100; NAME is of {names}")


def _train(options: argparse.Namespace) -> int:
    settings = parse_settings(options.settings, "density", "meta")
    categories = [_category(text) for text in options.data]
    for data, _ in categories:
        require(data, "images of a category: a folder, a table of paths, or the YAML of a datamodule")
    from anomalib_metarefine.meta.maml import get_learner
    from anomalib_metarefine.model.initialisation import learn_shared

    if options.out.is_dir():
        msg = f"--out is a file, such as {options.out / 'init.ckpt'}; {options.out} is a folder."
        raise ValueError(msg)
    get_learner(settings.meta_backend)  # now, not after a pass over the images
    shared = learn_shared(
        categories,
        backbone=options.backbone,
        settings=settings,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    shared.save(options.out)
    for category in shared.run["data"]:
        height, width = category["image_size"]
        print(f"{category['source']}: {category['images']} images at {height} x {width} pixels")
    start = command_line("anomalib", "train", "--model", "MetaRefine", "--model.init_from", options.out)
    print(f"{options.out}: start from it with `{start}`")
    return 0


def _category(text: str) -> tuple[str, tuple[int, int] | None]:
    """``DATA`` or ``DATA@HxW``."""
    found = re.fullmatch(r"(.+)@(\d+)x(\d+)", text)
    return (found[1], (int(found[2]), int(found[3]))) if found else (text, None)


META = {
    "meta-train": Command(
        "a meta-learned initialisation over several categories, as a file",
        "Meta-trains the flow on episodes of each category in turn. A new category starts from the result, with "
        "`init_from`, instead of meta-training on its own images.",
        _train_arguments,
        _train,
    ),
}
