"""A folder of tables from the results of `metarefine bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from anomalib_metarefine.benchmark.report.cells import checked, model_order, on_machine, scenarios, share
from anomalib_metarefine.benchmark.report.tables import IMAGE, IMAGE_AUROC, PIXEL, comparison, comparisons, costs, gains
from anomalib_metarefine.benchmark.report.typeset import Table, pipe_table
from anomalib_metarefine.benchmark.table import TRAININGS, label

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pandas as pd

_HOW_TO_READ = """\
Every model is trained on a folder of images that are said to be good, of which a known share is not: **raw** on
everything, **curated** on what `curate` lets pass, **repaired** on the same with the places that look unusual
replaced, **clean** on the truly clean part, which no user knows. The test set is the same for all. MetaRefine refines
itself, so its raw training already leaves images out; "MetaRefine, unrefined" is the same model without that. Raw is
what a user gets from a dirty folder; the distance to clean is what the dirt costs.

Figures are means over seeds ± their standard deviation; a seed draws the images, the dirt among them and all
initialisations. Averages count every data set the same, in a data set every category, and take in only cells (data
set, category, seed) where all that is compared has a figure, so that no model is better off for what it could not
run. Numbers in brackets lead to footnotes, which name the cells. "-": could not be run; an empty place: not run yet."""


class File(NamedTuple):
    """A file of tables."""

    stem: str  # of its name
    title: str  # what is in it
    tables: list[Table]  # its tables; a file without any is not written

    def write(self, folder: Path) -> Path:
        """Write it into a folder, and say where."""
        path = folder / f"{self.stem}.md"
        text = "\n".join([f"# {self.title}\n", *(one.markdown() for one in self.tables)])
        path.write_text(text, encoding="utf-8")
        return path


def report(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Write tables in Markdown, and a README.md that leads to all of them.

    Args:
        rows (pd.DataFrame): Columns of `table.Row`, from one or several result files.
        folder (Path): Made if it does not exist. Results with several protocols get a folder each.

    Returns:
        list[Path]: All files written, README.md first.

    Raises:
        ValueError: If rows do not belong together; see `cells.checked`.
    """
    rows = checked(rows)
    parts = scenarios(rows)
    written: list[Path] = []
    text = ["# Benchmark: training on dirty folders", _HOW_TO_READ]
    for scenario, part in parts.items():
        place = folder / scenario.slug if len(parts) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        files = [one for one in _files(part) if one.tables]
        written += [one.write(place) for one in files]
        link = f"{scenario.slug}/" if len(parts) > 1 else ""
        text.append(f"## Results: {scenario}")
        text.append(comparison(part, IMAGE_AUROC, "raw", categories=False).markdown(level=3))
        text.append("\n".join(f"- [{one.title}]({link}{one.stem}.md)" for one in files))
    text += _what_was_run(rows)
    readme = folder / "README.md"
    readme.write_text("\n\n".join(part.strip("\n") for part in text) + "\n", encoding="utf-8")
    return [readme, *written]


def _files(rows: pd.DataFrame) -> Iterator[File]:
    yield File(
        "image_auroc", "Image AUROC of every model, data set and contamination", comparisons(rows, [IMAGE_AUROC])
    )
    yield File("curation", "What curation and refinement give: raw, curated, clean, recovered share", gains(rows))
    yield File("pixel", "Pixel metrics, where there are masks", comparisons(rows, PIXEL))
    yield File("image_other", "Other image metrics", comparisons(rows, IMAGE))
    yield File("cost", "Seconds, images per second, memory", costs(rows))


def _what_was_run(rows: pd.DataFrame) -> Iterator[str]:
    ran = rows[rows.reason == ""]
    yield "## What was run"
    yield pipe_table(_data(*place, part) for place, part in rows.groupby(["data", "category"]))
    yield pipe_table(_model(model, rows[rows.model == model]) for model in model_order(rows.model))
    machines = sorted({on_machine(*one) for one in ran[["machine", "jobs"]].itertuples(index=False, name=None)})
    dates = sorted(ran.date[ran.date != ""])
    facts = {
        "Versions": "; ".join(sorted(set(ran.versions) - {""})),
        "Machines": "; ".join(machines),
        "Dates": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
    }
    yield "\n".join(f"- {name}: {fact or 'not stated'}" for name, fact in facts.items())
    yield "## Could not be run"
    failed = rows[rows.reason != ""]
    lines = [f"- {_failure(reason, part, rows)}" for reason, part in failed.groupby("reason")]
    yield "\n".join(lines) or "Every cell in the results ran."


def _data(data: str, category: str, rows: pd.DataFrame) -> dict[str, str]:
    tested = rows[rows.reason == ""]
    counts = [_range(tested[name].astype(int)) for name in ("test_normal", "test_abnormal")]
    return {
        "data": label(data, category),
        "image size": rows.image_size.iloc[0],
        "training images": str(int(rows.train_images.iloc[0]) or "all"),
        "good / defective test images": " / ".join(counts),
        "dirty": ", ".join(map(share, sorted(rows.contamination.unique()))),
        "seeds": ", ".join(map(str, sorted(rows.seed.unique()))),
    }


def _model(model: str, rows: pd.DataFrame) -> dict[str, str]:
    failed = int((rows.reason != "").sum())
    return {
        "model": model,
        "settings": "; ".join(f"`{text}`" for text in sorted(rows.settings.unique())),
        "backbone": ", ".join(sorted(rows.backbone.unique())),
        "trainings": ", ".join(training for training in TRAININGS if training in set(rows.training)),
        "cells run": str(len(rows) - failed),
        "not run": str(failed),
    }


def _range(counts: pd.Series) -> str:
    if counts.empty:
        return "-"
    return " to ".join(dict.fromkeys([str(counts.min()), str(counts.max())]))


def _failure(reason: str, part: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Where a reason applies, in few words."""
    models = model_order(part.model)
    who = "all models" if models == model_order(rows.model) else ", ".join(models)
    where = ", ".join(
        sorted({label(*place) for place in part[["data", "category"]].itertuples(index=False, name=None)})
    )
    dirty = ", ".join(map(share, sorted(part.contamination.unique())))
    cells = f"{len(part)} cell{'s' * (len(part) > 1)}"
    return f"{who} on {where} at {dirty} ({cells}): {reason}"
