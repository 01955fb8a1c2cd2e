"""Models side by side: accuracy, what curation gives, what a model costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from anomalib_metarefine.benchmark.report.cells import (
    CELL,
    REFINED,
    UNREFINED,
    common_cells,
    macro_average,
    model_order,
    on_machine,
    share,
    spell,
    with_training_seconds,
)
from anomalib_metarefine.benchmark.report.typeset import Notes, Table, spread
from anomalib_metarefine.benchmark.table import TRAININGS, label

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REFERENCE = "PaDiM"  # what the cost of the others is measured by; the first model if it is not there
_MEANING = {
    "raw": "trained on everything in the folder",
    "curated": "trained on what curation lets pass",
    "repaired": "trained on what curation lets pass, unusual regions replaced",
    "clean": "trained on the truly clean part",
}
_NO_FIGURE = "It ran, and gives no such figure."
_LEAST_GAP = 0.005  # image AUROC between raw and clean: below it there is nothing to recover, only noise to divide by
_THREE = ["raw", "curated", "clean"]
_OWN, _REPAIRED = f"{REFINED}'s own refinement", ", repaired"


@dataclass(frozen=True)
class Metric:
    """A column of the results, printed times 100 with one decimal."""

    column: str
    name: str


IMAGE_AUROC = Metric("image_AUROC", "Image AUROC, %")
IMAGE = (Metric("image_AUPR", "Image AUPR, %"), Metric("image_F1Max", "Best image F1, %"))
PIXEL = (
    Metric("pixel_AUROC", "Pixel AUROC, %"),
    Metric("pixel_AUPRO", "Pixel AUPRO (per-region overlap), %"),
    Metric("pixel_AUPIMO", "Pixel AUPIMO (per-image overlap), %"),
    Metric("pixel_AUPR", "Pixel AUPR, %"),
    Metric("pixel_F1Max", "Best pixel F1, %"),
)


def comparisons(rows: pd.DataFrame, metrics: Sequence[Metric]) -> list[Table]:
    """One `comparison` per training and metric, raw training first; those without any row are not there."""
    tables = (comparison(rows, metric, training) for training in TRAININGS for metric in metrics)
    return [table for table in tables if table.lines]


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
    models, notes = model_order(rows.model), Notes()
    most = int(rows.groupby([*CELL[:2], "contamination", "model"])[metric.column].count().max()) if len(rows) else 0
    lines, best = [], []
    for name, part, is_average in _parts(rows, categories):
        for contamination, level in part.groupby("contamination"):
            means, note = _averages(level, metric.column) if is_average else (_means(level, metric.column), "")
            texts = {model: _text(model, level, means, most, notes, is_average) for model in models}
            lines.append({"data": notes.mark(name, note), "dirty": share(contamination), **texts})
            # A mean over other seeds is over other images: no better or worse.
            highest = means["mean"].round(3).max() if means.seeds.nunique() <= 1 and len(means) > 1 else None
            best.append(set(means.index[means["mean"].round(3) == highest]))
    return Table(
        f"{metric.name}, {_MEANING[training]}",
        lines,
        f"Mean ± standard deviation over {most} seed{'s' * (most != 1)}; (n): over n of them. The highest of a row is "
        "bold, where all are over the same seeds. Averages count every data set the same, and are over cells that all "
        "models of the row have.",
        notes,
        best,
    )


def _parts(rows: pd.DataFrame, categories: bool) -> Iterator[tuple[str, pd.DataFrame, bool]]:
    """Categories, the average of each data set that has several, and the average of all data sets."""
    for data, of_data in rows.groupby("data"):
        several = of_data.category.nunique() > 1
        if categories or not several:
            for category, part in of_data.groupby("category"):
                yield label(data, category), part, False
        if several:
            yield f"{data}, average", of_data, True
    if rows.data.nunique() > 1:
        yield "average of data sets", rows, True


def _means(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean, spread and seeds of every model that has a figure."""
    found = rows.dropna(subset=[column]).groupby("model")
    return pd.DataFrame({"mean": found[column].mean(), "sd": found[column].std(), "seeds": found.seed.agg(frozenset)})


def _averages(rows: pd.DataFrame, column: str) -> tuple[pd.DataFrame, str]:
    """The same over the cells that all models have, and which these are."""
    wide = common_cells(rows, column, ["model"])
    if wide.empty:
        return _means(rows.iloc[:0], column), "There is no cell that all models of the row have."
    average = macro_average(wide)
    common = set(wide.index.droplevel("seed"))
    left_out = sorted(set(rows[CELL[:2]].itertuples(index=False, name=None)) - common)
    names = ", ".join(label(*place) for place in left_out)
    note = f"Over {spell(wide)}." + (f" Left out, as some model has no figure: {names}." if names else "")
    return pd.DataFrame({"mean": average.mean, "sd": average.sd}).assign(seeds=average.seeds), note


def _text(model: str, rows: pd.DataFrame, means: pd.DataFrame, most: int, notes: Notes, is_average: bool) -> str:
    own = rows[rows.model == model]
    reason = " ".join(sorted(set(own.reason) - {""}))
    if model in means.index:
        found = means.loc[model]
        few = not is_average and len(found.seeds) < most
        text = spread(found["mean"], found.sd) + (f" ({len(found.seeds)})" if few else "")
        return text if is_average else notes.mark(text, reason)
    return notes.mark("-", reason or ("" if is_average else _NO_FIGURE)) if len(own) else ""


def gains(rows: pd.DataFrame) -> list[Table]:
    """What curation gives each model: on average, and everywhere; none if no model was trained curated.

    Training on repaired images counts as another curation, of a model by another name; so does MetaRefine's own
    refinement, whose raw and clean trainings are those of the same model without it.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        list[Table]: Both tables.
    """
    pairs = paired(rows)
    if pairs.empty:
        return []
    lines = []
    for (model, data, category, contamination), group in pairs.groupby(["model", *CELL[:2], "contamination"]):
        lines.append({
            "model": model, "data": label(data, category), "dirty": share(contamination), "seeds": str(len(group)),
            **{name: spread(group[name].mean(), group[name].std()) for name in _THREE},
            "recovered": _percent(recovered_share(group)), "rejected": f"{group.rejected.mean():.1f}",
            "precision": _percent(group.precision.mean()), "recall": _percent(group.recall.mean()),
        })  # fmt: skip
    everywhere = Table(
        "What curation gives",
        lines,
        "Image AUROC in %, mean ± standard deviation over the seeds whose three trainings ran; recovered: (curated - "
        f"raw) / (clean - raw), a ratio of means, left out where clean is not {100 * _LEAST_GAP:.1f} points above raw. "
        "Rejected images per seed; precision over the seeds that rejected any.",
    )
    return [_gains_on_average(pairs), everywhere]


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """Image AUROC of raw, curated and clean training side by side, and what the curation rejected.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        pd.DataFrame: One row per model, data set, category, contamination and seed whose three trainings all ran.
    """
    repaired = rows[rows.model.isin(rows.model[rows.training == "repaired"]) & (rows.training != "curated")]
    repaired = repaired.assign(model=repaired.model + _REPAIRED).replace({"training": {"repaired": "curated"}})
    refined = rows[(rows.model == REFINED) & (rows.training == "raw")].assign(training="curated")
    unrefined = rows[(rows.model == UNREFINED) & (rows.training != "curated")]
    own = pd.concat([unrefined, refined]).assign(model=_OWN)
    rows = pd.concat([rows[rows.training != "repaired"], repaired, own], ignore_index=True)
    key = ["model", *CELL, "contamination"]
    wide = rows.pivot(index=key, columns="training", values="image_AUROC").reindex(columns=_THREE).dropna()
    found = rows[rows.training == "curated"].set_index(key)[["rejected", "precision", "recall"]]
    return wide.join(found).reset_index()


def recovered_share(pairs: pd.DataFrame) -> float:
    """Share of the gap between raw and clean training that curation closes, as a ratio of means.

    Args:
        pairs (pd.DataFrame): Columns ``raw``, ``curated``, ``clean``: image AUROC in [0, 1].

    Returns:
        float: Mean of curated - raw over mean of clean - raw; NaN where that gap is below 0.005, or there are no rows.

    Example:
        >>> recovered_share(pd.DataFrame({"raw": [0.8, 0.7], "curated": [0.9, 0.7], "clean": [0.9, 0.8]})).round(3)
        np.float64(0.5)
    """
    gap = (pairs.clean - pairs.raw).mean()
    # Written so that the NaN of no rows ends here too.
    return (pairs.curated - pairs.raw).mean() / gap if gap >= _LEAST_GAP else float("nan")


def _gains_on_average(pairs: pd.DataFrame) -> Table:
    """Over the cells that every model has: shares of other gaps can't be compared."""
    where, models = [*CELL, "contamination"], model_order(pairs.model)
    common = pairs[pairs.groupby(where).model.transform("nunique") == len(models)]
    dirty = common[common.contamination > 0]
    parts = {f"recovered at {share(one)}": part for one, part in dirty.groupby("contamination")}
    parts |= {"recovered, all dirty": dirty, "lost on clean data": common[common.contamination == 0]}
    repaired = [model for model in models if model.endswith(_REPAIRED)]
    groups = {model: [model] for model in models}
    groups |= {"all": [model for model in models if model not in [*repaired, _OWN]]}
    groups |= {f"all{_REPAIRED}": repaired} if repaired else {}
    notes, lines = Notes(), []
    for name, part in parts.items():
        if part.empty:
            continue
        line = {"": notes.mark(name, f"Over {spell(part.set_index(where))}.")}
        for title, group in groups.items():
            means = part[part.model.isin(group)].groupby(["data", "contamination", "category"])[_THREE].mean()
            means = means.groupby(["data", "contamination"]).mean()
            lost = f"{100 * (means.raw - means.curated).mean():.1f}"
            line[title] = lost if name.startswith("lost") else _percent(recovered_share(means))
        lines.append(line)
    return Table(
        "What curation gives, on average",
        lines,
        "Over the cells that all models have; every data set counts the same. Lost on clean data: raw - curated in "
        "folders without dirty images, in points of image AUROC.",
        notes,
    )


def costs(rows: pd.DataFrame) -> list[Table]:
    """Cost of raw training and of prediction: one table per machine, as seconds depend on it.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        list[Table]: Medians over contaminations and seeds, and ratios to a reference model over the cells of both.
    """
    tables = []
    where = [*CELL, "contamination"]
    for (machine, jobs), part in with_training_seconds(rows).groupby(["machine", "jobs"]):
        models = model_order(part.model)
        reference = REFERENCE if REFERENCE in models else models[0]
        lines = []
        for (data, model), cells in part.groupby(["data", "model"]):
            own = part[(part.data == data) & (part.model == reference)].set_index(where)
            found = cells.set_index(where)
            middle = found.median(numeric_only=True)
            lines.append({
                "data": data, "model": model, "cells": str(len(cells)), "fit, s": _number(middle.fit_seconds),
                "features, s": _number(middle.feature_seconds), "images, 1/s": _number(middle.images_per_second),
                f"training, x {reference}": _number((found.training_seconds / own.training_seconds).median()),
                f"images/s, x {reference}": _number((found.images_per_second / own.images_per_second).median()),
                "peak memory, MB": _number(middle.peak_memory_mb), "model, MB": _number(middle.model_mb),
            })  # fmt: skip
        text = (
            "Raw training, medians over contaminations and seeds. Features: one pass of the backbone, which models and "
            "trainings share in the benchmark; training is fit and features together. Images per second: predicted one "
            f"at a time, backbone included. Ratios to {reference} depend less on the machine than seconds do. Peak "
            "memory: growth of the process's peak while fitting and predicting."
        )
        tables.append(Table(f"Cost on {on_machine(machine, jobs)}", lines, text))
    return tables


def _percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{round(100 * value)} %"


def _number(value: float) -> str:
    """Three digits; seconds and megabytes need no more."""
    if pd.isna(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
