"""The subcommand from a folder to a verified model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_metarefine.cli.command import Command, backbone_arguments, command_line, require
from anomalib_metarefine.settings import parse_settings, setting_names

if TYPE_CHECKING:
    import argparse

_IMAGES = "a folder of images, a table of paths, or the YAML of a datamodule"


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="folder of images, CSV or Parquet of paths, or YAML of a datamodule")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of its own; call again to go on after a stop")
    add("--model", default="MetaRefine", metavar="NAME", help="class in anomalib.models, such as Patchcore")
    add("--model-args", nargs="+", default=[], metavar="NAME=VALUE", help="of that class, such as n_features=100")
    add("--max-epochs", type=int, metavar="N", help="for models that don't know when to stop")
    add("--curation", type=Path, metavar="DIR", help="output folder of curate: train on what it keeps")
    add("--decisions", type=Path, metavar="CSV", help="a person's decisions")
    add("--review", choices=["keep", "reject"], default="keep", help="whether to train on images for review")
    add("--test", metavar="DATA", help="labelled images to verify on: folders named good and others, or a table")
    backbone_arguments(parser)
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="in pixels; default: the shape of the images")
    add("--settings", nargs="+", default=[], metavar="NAME=VALUE", help=f"NAME is of {', '.join(setting_names())}")
    add("--ignore", type=Path, metavar="FILE", help="regions to ignore: a picture, black there, or polygons")
    add("--false-alarm-rate", type=float, default=0.01, metavar="P", help="share of normal images above the threshold")


def _train(options: argparse.Namespace) -> int:
    for path, expected in (
        (options.data, _IMAGES),
        (options.curation, "the output folder of a curation"),
        (options.decisions, "a CSV file of decisions, or a folder that has one"),
        (options.test, "labelled images: a folder or a table of paths"),
        (options.ignore, "a picture or polygons"),
    ):
        if path is not None:
            require(path, expected)
    settings = parse_settings(options.settings)
    names = [item.partition("=")[0].strip() for item in options.settings]
    from anomalib_metarefine.train.plan import Plan
    from anomalib_metarefine.train.run import Run

    same = ("model", "max_epochs", "backbone", "image_size", "batch_size", "seed", "review", "false_alarm_rate")
    plan = Plan(
        **{name: getattr(options, name) for name in same},
        **{name: _absolute(getattr(options, name)) for name in ("data", "curation", "decisions", "test", "ignore")},
        init_args=_arguments(options.model_args),
        settings={name: getattr(settings, name) for name in names},
    )
    run = Run(options.out, plan, (lambda _text: None) if options.quiet else _tell, not options.quiet)
    run.go()
    _show(run)
    model = options.out / "weights" / "openvino"
    print(f"{options.out.resolve() / 'report.md'} has the figures.")
    if run.passed:
        print(f"Next: {command_line('metarefine', 'watch', model, 'FOLDER', '--out', 'RESULTS.jsonl')}")
    else:
        print(f"FAILED: {'; '.join(run.steps['verify'].figures['problems'])}.")
    return 0 if run.passed else 1


def _absolute(path: str | Path | None) -> str | None:
    from anomalib_metarefine.images.sources import absolute

    return None if path is None else str(absolute(Path(path).expanduser()))


def _arguments(items: list[str]) -> dict[str, Any]:
    """Values as YAML has them: numbers, true and false, lists, texts."""
    import yaml

    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            msg = f"--model-args takes NAME=VALUE, found {item!r}."
            raise ValueError(msg)
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            msg = f"--model-args: {text!r} is no value of {name} ({error})."
            raise ValueError(msg) from error
    return found


def _tell(text: str) -> None:
    print(f"metarefine: {text}", file=sys.stderr, flush=True)


def _show(run: Any) -> None:  # noqa: ANN401
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from anomalib_metarefine.train.report import step_table

    shown = Table("step", "result", "seconds")
    for row in step_table(run.steps).itertuples(index=False):
        shown.add_row(row.step, Text(row.result, overflow="fold"), f"{row.seconds:.1f}")
    Console().print(shown)


TRAIN = {
    "train": Command(
        "from a folder of images to a verified model for the line, in one command",
        "Curates, trains on what is kept, calibrates, exports and verifies, for MetaRefine or any other model of "
        "anomalib. Each step leaves its result in DIR; called again, it goes on where it stopped. To review in "
        "between: metarefine curate, metarefine review, metarefine train --curation. Exit code 1 if the exported model "
        "does not decide like its checkpoint, or finds not one of the labelled defects.",
        _train_arguments,
        _train,
    ),
}
