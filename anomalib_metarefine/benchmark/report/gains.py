"""What leaving images out is worth: raw, curated and truly clean training side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from anomalib_metarefine.benchmark.report.cells import CELL, REFINED, UNREFINED, model_order, share, spell
from anomalib_metarefine.benchmark.report.tables import spread
from anomalib_metarefine.benchmark.report.typeset import Cell, Table
from anomalib_metarefine.benchmark.table import label

if TYPE_CHECKING:
    from collections.abc import Callable

_KEY = ["model", "data", "category", "contamination"]
_LEAST_GAP = 0.005  # image AUROC between raw and clean: below it there is nothing to recover, only noise to divide by
_OWN = f"{REFINED}'s own refinement"
_REPAIRED = ", repaired"
_TRAININGS = ["raw", "curated", "clean"]


def own_refinement(rows: pd.DataFrame) -> pd.DataFrame:
    """MetaRefine's refinement as if it were a curation of its unrefined self.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        pd.DataFrame: Rows of a model by another name: raw and clean are those of the unrefined model, curated is the
            raw training of the refined one. No rows if either is missing.
    """
    unrefined = rows[(rows.model == UNREFINED) & rows.training.isin(["raw", "clean"])]
    refined = rows[(rows.model == REFINED) & (rows.training == "raw")].assign(training="curated")
    if unrefined.empty or refined.empty:
        return rows.iloc[:0]
    return pd.concat([unrefined, refined], ignore_index=True).assign(model=_OWN)


def repair(rows: pd.DataFrame) -> pd.DataFrame:
    """Training on repaired images as if it were another curation, of models by another name.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        pd.DataFrame: Raw, repaired (as curated) and clean rows of the models that were trained on repaired images.
    """
    models = rows.model[rows.training == "repaired"].unique()
    part = rows[rows.model.isin(models) & rows.training.isin(["raw", "repaired", "clean"])]
    return part.assign(training=part.training.replace("repaired", "curated"), model=part.model + _REPAIRED)


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """Image AUROC of the three trainings side by side, with the curation's own figures.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        pd.DataFrame: One row per model, data set, category, contamination and seed whose three trainings all ran, with
            ``raw``, ``curated``, ``clean``, ``rejected``, ``precision`` and ``recall``.
    """
    key = [*_KEY, "seed"]
    wide = rows.pivot(index=key, columns="training", values="image_AUROC").reindex(columns=_TRAININGS).dropna()
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


def gains(rows: pd.DataFrame) -> list[Table]:
    """What curation gives each model: everywhere, and on average.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        list[Table]: Both tables; none if no model has been trained curated.
    """
    curated = model_order(rows[rows.training == "curated"].model)
    others = [rows[rows.model.isin(curated)], repair(rows), own_refinement(rows)]
    models = [*curated, *model_order(others[1].model), *others[2].model.unique()]
    if not models:
        return []
    rows = pd.concat(others, ignore_index=True)
    pairs = paired(rows)
    tables = [_everywhere(rows, pairs, models), _on_average(pairs, [m for m in models if m in set(pairs.model)])]
    return [table for table in tables if table.rows]


def _everywhere(rows: pd.DataFrame, pairs: pd.DataFrame, models: list[str]) -> Table:
    failed = rows[rows.reason != ""].groupby(_KEY).reason.agg(lambda reasons: " ".join(sorted(set(reasons))))
    groups = dict(list(pairs.groupby(_KEY)))
    body: list[list[Cell | str]] = []
    breaks = set()
    for model in models:
        breaks.add(len(body))
        for key in sorted(key for key in {*groups, *failed.index} if key[0] == model):
            head = [model, label(key[1], key[2]), share(key[3])]
            reason = failed.get(key, "")
            if key not in groups:
                body.append([*head, Cell("0", note=reason), *["-"] * 7])
                continue
            group = groups[key]
            accuracy = [spread(group[name].mean(), group[name].std()) for name in _TRAININGS]
            found = [f"{group.rejected.mean():.1f}", _percent(group.precision.mean()), _percent(group.recall.mean())]
            seeds = Cell(str(len(group)), note=reason)
            body.append([*head, seeds, *accuracy, _percent(recovered_share(group)), *found])
    return Table(
        "What curation gives",
        ["model", "data", "dirty", "seeds", *_TRAININGS, "recovered", "rejected", "precision", "recall"],
        body,
        labels=2,
        text="Image AUROC in %, mean ± standard deviation over the seeds whose three trainings ran; recovered: "
        f"(curated - raw) / (clean - raw), a ratio of means, left out where clean is not {100 * _LEAST_GAP:.1f} points "
        "above raw. Rejected images per seed; precision over the seeds that rejected any. In the rows of "
        f"{_OWN}, raw and clean are the model without it, and curated is the model with it, on everything; in those "
        "of a model, repaired, curated is the training on what curation keeps, unusual regions replaced.",
        breaks=breaks,
    )


def _on_average(pairs: pd.DataFrame, models: list[str]) -> Table:
    """Over the cells that every model has: shares of other gaps can't be compared."""
    where = [*CELL, "contamination"]
    common = pairs[pairs.groupby(where).model.transform("nunique") == len(models)]
    dirty, clean = common[common.contamination > 0], common[common.contamination == 0]

    repaired = [model for model in models if model.endswith(_REPAIRED)]
    curated = [model for model in models if model not in repaired and model != _OWN]
    together = {"all": curated, f"all{_REPAIRED}": repaired}
    together = {name: group for name, group in together.items() if group}

    def row(title: str, part: pd.DataFrame, value: Callable[[pd.DataFrame], str]) -> list[Cell | str]:
        groups = [*([model] for model in models), *together.values()]
        note = f"Over {spell(part.set_index(where))}."
        return [Cell(title, note=note), *(value(_means(part[part.model.isin(group)])) for group in groups)]

    def recovered(means: pd.DataFrame) -> str:
        return _percent(recovered_share(means))

    body = [row(f"recovered at {share(one)}", part, recovered) for one, part in dirty.groupby("contamination")]
    if len(dirty):
        body.append(row("recovered, all dirty", dirty, recovered))
    if len(clean):
        body.append(row("lost on clean data", clean, lambda means: f"{100 * (means.raw - means.curated).mean():.1f}"))
    return Table(
        "What curation gives, on average",
        ["", *models, *together],
        body,
        labels=1,
        text="Over the cells that all models have; every data set counts the same. Lost on clean data: raw - curated "
        "in folders without dirty images, in points of image AUROC.",
    )


def _means(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row per data set and contamination: means over categories, of means over seeds and models."""
    place = ["data", "contamination"]
    by_category = pairs.groupby([*place, "category"])[_TRAININGS].mean()
    return by_category.groupby(place).mean()


def _percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{100 * value:.0f} %"
