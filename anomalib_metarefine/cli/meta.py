"""Subcommands about meta-training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import Command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from anomalib_metarefine.refinement.engine import FitSettings


def _settings(texts: Sequence[str]) -> FitSettings:
    """``NAME=VALUE`` as settings, each of the type of its default.

    Raises:
        ValueError: If there is no such setting, its value is of another type, or names what does not exist.
    """
    from anomalib_metarefine.meta.maml import get_learner
    from anomalib_metarefine.meta.training import check_algorithm
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
    check_algorithm(settings.meta_algorithm)  # now, not after a pass over the images
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


META = {
    "meta-train": Command(
        "a meta-learned initialisation over several categories, as a file",
        "Meta-trains the flow on episodes of each category in turn. A new category starts from the result, with "
        "`init_from`, instead of meta-training on its own images.",
        _train_arguments,
        _train,
    ),
}
