"""Figures of curves and clouds: accuracy and rejection against contamination, accuracy against cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from anomalib_metarefine.benchmark.report.cells import CELL, REFINED, common_cells, macro_average, spell
from anomalib_metarefine.benchmark.report.costs import on_machine, with_training_seconds
from anomalib_metarefine.benchmark.report.drawing import Picture, Style, canvas, legend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

_LINE = ["model", "training", "contamination"]
_DASHES = {"raw": "-", "curated": (0, (4, 2))}
_COSTS = (
    ("training_seconds", "training, s (left is better)"),
    ("images_per_second", "images per second (right is better)"),
    ("peak_memory_mb", "peak memory, MB (left is better)"),
    ("model_mb", "model, MB (left is better)"),
)


def against_contamination(rows: pd.DataFrame, style: Style) -> Iterator[Picture]:
    """Image AUROC against contamination: a panel for each data set, and one for their average.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        style (Style): How the models look.

    Yields:
        Picture: One.
    """
    name, title = "against_contamination", "Accuracy against contamination"
    rows = rows[rows.training.isin(_DASHES) & rows.image_AUROC.notna()]
    if rows.contamination.nunique() < 2:
        yield Picture(name, title, "There are figures for fewer than two contaminations.")
        return
    panels = [(data, _curves(part)) for data, part in rows.groupby("data")]
    caption = ""
    if len(panels) > 1:
        wide = common_cells(rows, "image_AUROC", _LINE)
        if len(wide):
            panels.append(("average", _curves(rows)))
            caption = f" The average is over the cells that every line has everywhere: {spell(wide)}."
        else:
            caption = " There is no average, as no cell has every line everywhere."
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    height = -(-len(panels) // columns)
    figure, axes = canvas(max(7.8, 3.6 * columns + 0.6), 3.2 * height + 1, height, columns, sharex=True)
    for ax, (data, curves) in zip(axes.flat, panels, strict=False):
        _draw_curves(ax, curves, style)
        ax.set_title(data)
        ax.set_xlabel("dirty training images, %")
        ax.tick_params(labelbottom=True)
        ax.set_xticks(sorted(100 * rows.contamination.unique()))
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("image AUROC, %")
    for model in style.models:
        if model in set(rows.model):
            axes[0, 0].plot([], [], label=model, **style.line(model))
    for training, dashes in _DASHES.items():
        axes[0, 0].plot([], [], color="#555555", linestyle=dashes, label=f"trained {training}")
    legend(figure, axes[0, 0])
    yield Picture(
        name,
        title,
        "Image AUROC, mean over seeds; bands: a standard deviation of the raw training to each side. Solid: trained on "
        f"everything (raw); dashed: on what curation lets pass.{caption}",
        figure,
    )


def _curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread in per cent, by `_LINE`: over seeds in one category, over common cells of several."""
    if rows[CELL[:2]].drop_duplicates().shape[0] == 1:
        found = rows.groupby(_LINE).image_AUROC.agg(["mean", "std"])
    else:
        average = macro_average(common_cells(rows, "image_AUROC", _LINE))
        found = pd.DataFrame({"mean": average.mean, "std": average.sd})
    return 100 * found


def _draw_curves(axes: Axes, curves: pd.DataFrame, style: Style) -> None:
    for (model, training), line in curves.groupby(["model", "training"]):
        x = 100 * line.index.get_level_values("contamination").to_numpy()
        look = style.line(model)
        axes.plot(x, line["mean"], linestyle=_DASHES[training], linewidth=1.5, markersize=5, **look)
        if training == "raw":
            low, high = line["mean"] - line["std"].fillna(0), line["mean"] + line["std"].fillna(0)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)


def rejection(rows: pd.DataFrame, style: Style) -> Iterator[Picture]:
    """Precision and recall of what was left out, against contamination.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        style (Style): How the models look.

    Yields:
        Picture: One.
    """
    name, title = "rejection", "What was left out"
    raw, curated = (rows[(rows.training == training) & (rows.reason == "")] for training in ("raw", "curated"))
    refining = [model for model in style.models if model == REFINED or (raw[raw.model == model].rejected > 0).any()]
    # A model that refines itself leaves out more than curation did; for the others, curation is the same.
    parts = {"curation": curated[~curated.model.isin(refining)]}
    parts |= {f"{model}'s own refinement": raw[raw.model == model] for model in refining}
    looks = [{"color": "#555555", "marker": "."}, *({**style.line(model), "linestyle": "--"} for model in refining)]
    cell = [*CELL, "contamination"]
    found = {
        who: part[part.contamination > 0].groupby(cell)[["precision", "recall"]].first() for who, part in parts.items()
    }
    found = {who: (part, look) for (who, part), look in zip(found.items(), looks, strict=True) if len(part)}
    if not found:
        yield Picture(name, title, "No training has left out anything that was known to be dirty or clean.")
        return
    data_sets = sorted({data for part, _ in found.values() for data in part.index.get_level_values("data")})
    shares = sorted({share for part, _ in found.values() for share in part.index.get_level_values("contamination")})
    figure, axes = canvas(max(6.2, 1 + 2.6 * len(data_sets)), 5.6, 2, len(data_sets), sharex=True, sharey=True)
    for who, (part, look) in found.items():
        for column, data in enumerate(data_sets):
            for row, figure_name in enumerate(["precision", "recall"]):
                values = 100 * part[part.index.get_level_values("data") == data][figure_name].dropna()
                by_seed = values.groupby(["contamination", "seed"]).mean().groupby("contamination")
                mean, sd = by_seed.mean(), by_seed.std().fillna(0)
                axes[row, column].errorbar(100 * mean.index, mean, yerr=sd, label=who, capsize=2, **look)
                axes[row, column].set_ylim(-4, 104)
    for column, data in enumerate(data_sets):
        axes[0, column].set_title(data)
        axes[1, column].set_xlabel("dirty training images, %")
        axes[1, column].set_xticks([100 * share for share in shares])
    axes[0, 0].set_ylabel("precision, %")
    axes[1, 0].set_ylabel("recall, %")
    legend(figure, axes[0, 0])
    yield Picture(
        name,
        title,
        "Precision: dirty share of what was left out, over the seeds that left out anything; no marker where none did. "
        "Recall: share of the dirty images that was left out. Mean and standard deviation over seeds, categories of a "
        "data set together.",
        figure,
    )


def against_cost(rows: pd.DataFrame, style: Style) -> Iterator[Picture]:
    """Image AUROC against seconds, images per second, memory and size.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        style (Style): How the models look.

    Yields:
        Picture: One.
    """
    name, title = "against_cost", "Accuracy against cost"
    raw = with_training_seconds(rows)
    cell = [*CELL, "contamination"]
    machines = raw.groupby(["machine", "jobs"]).size().sort_values(ascending=False, kind="stable")
    if len(machines):
        machine, jobs = machines.index[0]
        raw = raw[(raw.machine == machine) & (raw.jobs == jobs)]
    wide = common_cells(raw, "image_AUROC", ["model"], cell)
    if wide.empty:
        yield Picture(name, title, "There is no cell that all models have on one machine.")
        return
    accuracy = 100 * macro_average(wide).mean
    raw = raw.set_index(cell)
    raw = raw[raw.index.isin(wide.index)]
    figure, axes = canvas(9, 6.8, 2, 2, sharey=True)
    for ax, (column, text) in zip(axes.flat, _COSTS, strict=True):
        costs = np.exp(np.log(raw[column].where(raw[column] > 0)).groupby(raw.model).mean())
        for model in style.models:
            if model in accuracy and pd.notna(costs[model]):
                ax.plot(costs[model], accuracy[model], linestyle="", markersize=9, label=model, **style.line(model))
        ax.set_xscale("log")
        # More than two powers of ten leave no room for numbers between them.
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if costs.max() < 100 * costs.min() else (1,)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(text)
    for ax in axes[:, 0]:
        ax.set_ylabel("image AUROC, %")
    legend(figure, axes[0, 0])
    yield Picture(
        name,
        title,
        f"Raw training on {on_machine(machine, jobs)}: average image AUROC over data sets and contaminations, and "
        f"geometric mean of the cost, over the cells that all models have: {spell(wide)}. Training is fitting and one "
        "pass of the backbone.",
        figure,
    )
