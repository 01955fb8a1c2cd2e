"""Models side by side: accuracy, pixel metrics, points lost to the dirt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd

from anomalib_metarefine.benchmark.report.cells import (
    CELL,
    common_cells,
    macro_average,
    model_order,
    share,
    spell,
)
from anomalib_metarefine.benchmark.report.typeset import Cell, Table
from anomalib_metarefine.benchmark.table import TRAININGS, label

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MEANING = {
    "raw": "trained on everything in the folder",
    "curated": "trained on what curation lets pass",
    "repaired": "trained on what curation lets pass, unusual regions replaced",
    "clean": "trained on the truly clean part",
}
_NO_FIGURE = "It ran, and gives no such figure."


@dataclass(frozen=True)
class Metric:
    """A column of the results, as tables print it: times 100, with one decimal.

    Attributes:
        column (str): Its name in the results.
        name (str): What it is.
        lowest (bool): Whether the lowest is the best.
    """

    column: str
    name: str
    lowest: bool = False


IMAGE_AUROC = Metric("image_AUROC", "Image AUROC, %")
IMAGE = (Metric("image_AUPR", "Image AUPR, %"), Metric("image_F1Max", "Best image F1, %"))
PIXEL = (
    Metric("pixel_AUROC", "Pixel AUROC, %"),
    Metric("pixel_AUPRO", "Pixel AUPRO (per-region overlap), %"),
    Metric("pixel_AUPIMO", "Pixel AUPIMO (per-image overlap), %"),
    Metric("pixel_AUPR", "Pixel AUPR, %"),
    Metric("pixel_F1Max", "Best pixel F1, %"),
)
LOST_TO_CLEAN = Metric(
    "lost_to_clean", "Points of image AUROC below the same model on the truly clean part", lowest=True
)
LOST_TO_ZERO = Metric(
    "lost_to_zero", "Points of image AUROC below the same model in a folder without dirty images", lowest=True
)


def comparisons(rows: pd.DataFrame, metrics: Sequence[Metric]) -> list[Table]:
    """One table per training and metric; those without any row are not there.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        metrics (Sequence[Metric]): What to compare.

    Returns:
        list[Table]: From `comparison`; raw training first.
    """
    tables = (comparison(rows, metric, training) for training in TRAININGS for metric in metrics)
    return [table for table in tables if table.rows]


def comparison(rows: pd.DataFrame, metric: Metric, training: str, categories: bool = True) -> Table:
    """Models side by side, in the rows every data set, category and contamination, and averages of them.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        metric (Metric): What to compare.
        training (str): One of `TRAININGS`.
        categories (bool): Whether categories of a data set have rows of their own, beside their average.

    Returns:
        Table: Means and standard deviations over seeds, the best in bold. A data set is there if it has any figure, or
            could not be run at all.
    """
    rows = rows[rows.training == training]
    figures = rows.groupby("data")[metric.column].transform("count")
    rows = rows[(figures > 0) | (rows.groupby("data").reason.transform("min") != "")]
    models = model_order(rows.model)
    most = int(rows.groupby([*CELL[:2], "contamination", "model"])[metric.column].count().max()) if len(rows) else 0
    body: list[list[Cell | str]] = []
    breaks = set()
    for name, part, is_average in _parts(rows):
        if not (categories or is_average) and rows[rows.data == part.data.iloc[0]].category.nunique() > 1:
            continue
        breaks.add(len(body))
        for contamination, level in part.groupby("contamination"):
            if is_average:
                is_fair = True
                cells, note = _averages(level, metric.column, models)
                first: list[Cell | str] = [Cell(name, note=note), share(contamination)]
            else:
                # A mean over other seeds is over other images: no better or worse.
                found = level.dropna(subset=[metric.column])
                is_fair = found.groupby("model").seed.agg(frozenset).nunique() <= 1
                cells = _figures(level, metric.column, models, most)
                first = [name, share(contamination)]
            body.append([*first, *(_best_in_bold(cells, metric.lowest) if is_fair else cells)])
    return Table(
        f"{metric.name}, {_MEANING[training]}",
        ["data", "dirty", *models],
        body,
        labels=2,
        text=f"Mean ± standard deviation over {most} seed{'s' * (most != 1)}; (n): over n of them. The "
        f"{'lowest' if metric.lowest else 'highest'} of a row is bold, where all are over the same seeds. Averages "
        "count every data set the same, and are over cells that all models of the row have.",
        breaks=breaks,
    )


def _parts(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, bool]]:
    """Categories, the average of each data set that has several, and the average of all data sets."""
    for data, of_data in rows.groupby("data"):
        for category, part in of_data.groupby("category"):
            yield label(data, category), part, False
        if of_data.category.nunique() > 1:
            yield f"{data}, average", of_data, True
    if rows.data.nunique() > 1:
        yield "average of data sets", rows, True


def _figures(rows: pd.DataFrame, column: str, models: list[str], most: int) -> list[Cell]:
    """Mean and spread over the seeds of each model, or why there is none."""
    by_model = dict(list(rows.groupby("model")))
    cells = []
    for model in models:
        values = by_model[model][column].dropna() if model in by_model else pd.Series(dtype=float)
        reason = " ".join(sorted(set(by_model[model].reason) - {""})) if model in by_model else ""
        if len(values):
            text = spread(values.mean(), values.std())
            cells.append(Cell(text if len(values) == most else f"{text} ({len(values)})", note=reason))
        else:
            cells.append(Cell("-", note=reason or _NO_FIGURE) if model in by_model else Cell(""))
    return cells


def _averages(rows: pd.DataFrame, column: str, models: list[str]) -> tuple[list[Cell], str]:
    """The average of each model over the cells that all have, and which these are."""
    wide = common_cells(rows, column, ["model"])
    if wide.empty:
        return [Cell("-") for _ in models], "There is no cell that all models of the row have."
    average = macro_average(wide)
    without = dict(zip(models, _figures(rows[~rows.model.isin(wide.columns)], column, models, 0), strict=True))
    cells = [Cell(spread(average.mean[m], average.sd[m])) if m in wide else without[m] for m in models]
    common = wide.reset_index()[CELL[:2]].drop_duplicates()
    left_out = rows[CELL[:2]].drop_duplicates().merge(common, how="left", indicator=True)
    left_out = left_out[left_out._merge == "left_only"]
    names = ", ".join(label(*place) for place in left_out[CELL[:2]].itertuples(index=False, name=None))
    return cells, f"Over {spell(wide)}." + (f" Left out, as some model has no figure: {names}." if names else "")


def _best_in_bold(cells: list[Cell], lowest: bool) -> list[Cell]:
    values = {place: float(cell.text.split()[0]) for place, cell in enumerate(cells) if cell.text not in {"", "-"}}
    if len(values) < 2:
        return cells
    best = (min if lowest else max)(values.values())
    return [replace(cell, bold=values.get(place) == best) for place, cell in enumerate(cells)]


def spread(mean: float, deviation: float) -> str:
    """A share in per cent, with its standard deviation if there is one.

    Example:
        >>> spread(0.912, 0.004), spread(0.912, float("nan"))
        ('91.2 ± 0.4', '91.2')
    """
    text = f"{100 * mean:.1f}"
    return text if pd.isna(deviation) else f"{text} ± {100 * deviation:.1f}"


def losses(rows: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """What the dirt costs each model, measured against itself.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        metric (Metric): ``LOST_TO_CLEAN``, against the training on the truly clean part of the same folder, or
            ``LOST_TO_ZERO``, against the raw training in a folder without dirty images; same seed, both.

    Returns:
        pd.DataFrame: The rows that the dirt, or the curation, can have touched, with a column for the metric.
    """
    if metric is LOST_TO_CLEAN:
        reference, key = rows[rows.training == "clean"], [*CELL, "model", "contamination"]
    else:
        reference, key = rows[(rows.training == "raw") & (rows.contamination == 0)], [*CELL, "model"]
    touched = rows[rows.training.isin(["curated", "repaired"]) | ((rows.training == "raw") & (rows.contamination > 0))]
    touched = touched.join(reference.set_index(key)[["image_AUROC", "reason"]].add_suffix("_of_reference"), on=key)
    lost = touched.image_AUROC_of_reference - touched.image_AUROC
    reason = touched.reason.where(touched.reason != "", touched.reason_of_reference.fillna(""))
    found = touched.assign(**{metric.column: lost, "reason": reason})
    return found[lost.notna() | (reason != "")]
