"""Figures of result files of `metarefine bench`, and published figures of other methods beside them.

    python -m studies.figures results/bench.csv --out figures

The paper's figures 1, 4 and 5 (clean, corrupted, refined; every class; the average), and curves over contamination.
Every function takes the rows of one scenario, from `cells.scenarios`, and how the models look; it yields pictures, or
one without a figure that says what is missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from anomalib_metarefine.benchmark.report.cells import (
    CELL,
    REFINED,
    UNREFINED,
    checked,
    common_cells,
    macro_average,
    scenarios,
    share,
    spell,
)
from anomalib_metarefine.benchmark.table import label, read_results
from studies.drawing import Picture, Style, canvas, legend, look
from studies.published import published_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

_CHANCE = 50  # per cent image AUROC
_LINE = ["model", "training", "contamination"]
_DASHES = {"raw": "-", "curated": (0, (4, 2))}
# The bars of the paper's figure 1: what they are called, which model and which training they are of.
BARS = (("clean", UNREFINED, "clean"), ("corrupted", UNREFINED, "raw"), ("refined", REFINED, "raw"))


def paper_bars(rows: pd.DataFrame, _style: Style) -> Iterator[Picture]:
    """MetaRefine on clean images, on dirty ones, and refined: the paper's figure 1."""
    name, title = "clean_corrupted_refined", "Clean, corrupted, refined"
    bars = _bars_of(rows[rows.contamination > 0])
    if bars.empty:
        needed = "; ".join(f"{bar}: {model}, training {training}" for bar, model, training in BARS)
        yield Picture(name, title, f"There is no data set with all of these at one contamination: {needed}.")
        return
    data, shares = (sorted(bars.index.unique(level)) for level in (0, 1))
    by_share = len(shares) <= len(data)  # the fewer are the panels
    panels, groups = (shares, data) if by_share else (data, shares)
    width, height = max(5.5, 1 + 1.6 * len(groups)), 0.9 + 2.3 * len(panels)
    figure, axes = canvas(width, height, len(panels), sharex=True, sharey=True)
    for ax, panel in zip(axes[:, 0], panels, strict=True):
        found = bars.xs(panel, level=int(by_share)).reindex(groups)
        for place, (bar, *_) in enumerate(BARS):
            look = {"color": ("#009E73", "#999999", "#D55E00")[place], "hatch": ("", "//", "xx")[place]}
            _bars(ax, np.arange(len(groups)) + 0.27 * (place - 1), found[bar], found[f"{bar}_sd"], 0.25, bar, look)
        names = [text.replace(" (", "\n(") if by_share else f"{share(text)} dirty" for text in groups]
        ax.set_xticks(range(len(groups)), names)
        ax.grid(visible=False, axis="x")
        ax.set(title=f"{share(panel)} dirty" if by_share else panel, ylabel="image AUROC, %")
    _from_chance(axes[:, 0])
    legend(figure, axes[0, 0])
    yield Picture(
        name,
        title,
        f"Image AUROC, mean and standard deviation over seeds. Clean: {UNREFINED}, on the truly clean part; corrupted: "
        f"the same on everything; refined: {REFINED} on everything. Bars begin at chance, 50 %. The same cells for "
        "the three bars of a group.",
        figure,
    )


def _bars_of(rows: pd.DataFrame) -> pd.DataFrame:
    """``[(data set, contamination) x (bar, bar_sd)]`` in per cent, over cells that have all three bars."""
    rows = pd.concat([rows[(rows.model == m) & (rows.training == t)].assign(bar=bar) for bar, m, t in BARS])
    found = {}
    for (data, contamination), part in rows.groupby(["data", "contamination"]):
        wide = common_cells(part, "image_AUROC", ["bar"])
        if len(wide) and len(wide.columns) == len(BARS):
            average = macro_average(wide)
            categories = wide.index.get_level_values("category").nunique()
            key = f"{data} ({categories} categories)" if categories > 1 else data
            found[key, contamination] = {**average.mean, **average.sd.add_suffix("_sd")}
    return 100 * pd.DataFrame.from_dict(found, orient="index")


def by_class(rows: pd.DataFrame, style: Style) -> Iterator[Picture]:
    """Image AUROC of every class: the paper's figure 4, one for each contamination."""
    raw = rows[(rows.training == "raw") & rows.image_AUROC.notna()]
    for contamination, part in raw.groupby("contamination"):
        models = [model for model in style.models if model in set(part.model)]
        places = sorted(set(part[CELL[:2]].itertuples(index=False, name=None)), reverse=True)
        step = 0.8 / len(models)
        figure, ((axes,),) = canvas(8.5, 1.6 + len(places) * max(0.45, 0.1 * len(models)))
        for row, place in enumerate(places):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color="#F2F2F2", linewidth=0)
            of_place = part[(part.data == place[0]) & (part.category == place[1])]
            for order, model in enumerate(models):
                values = 100 * of_place[of_place.model == model].image_AUROC
                if len(values):
                    axes.errorbar(
                        values.mean(), row + 0.4 - step * (order + 0.5), xerr=_none_is_zero(values.std()),
                        linestyle="", markersize=6, elinewidth=1.2, label=model, **style.line(model),
                    )  # fmt: skip
        axes.set_yticks(range(len(places)), [label(*place) for place in places])
        axes.set_ylim(-0.5, len(places) - 0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"image AUROC, % ({share(contamination)} dirty)")
        legend(figure, axes)
        yield Picture(
            f"by_class_{_digits(contamination)}",
            f"Every class, {share(contamination)} dirty",
            "Image AUROC of the raw training, mean and standard deviation over seeds.",
            figure,
        )


def overall(rows: pd.DataFrame, style: Style) -> Iterator[Picture]:
    """The average over data sets: the paper's figure 5."""
    raw = rows[rows.training == "raw"]
    wides = {one: common_cells(part, "image_AUROC", ["model"]) for one, part in raw.groupby("contamination")}
    averages = {one: macro_average(wide) for one, wide in wides.items() if len(wide)}
    name, title = "overall", "Average over data sets"
    if not averages:
        yield Picture(name, title, "There is no cell that all models have.")
        return
    models = [model for model in style.models if any(model in average.mean for average in averages.values())]
    width = 0.84 / len(models)
    figure, ((axes,),) = canvas(max(7, 1 + 0.24 * len(models) * len(averages)), 4.2)
    for order, model in enumerate(models):
        here = [place for place, average in enumerate(averages.values()) if model in average.mean]
        found = [average for average in averages.values() if model in average.mean]
        means = pd.Series([100 * average.mean[model] for average in found])
        spreads = pd.Series([100 * average.sd[model] for average in found])
        offset = width * (order - (len(models) - 1) / 2)
        _bars(axes, np.array(here) + offset, means, spreads, 0.9 * width, model, style.bar(model))
    axes.set_xticks(range(len(averages)), [share(one) for one in averages])
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="dirty training images", ylabel="image AUROC, %")
    _from_chance([axes])
    legend(figure, axes)
    where: dict[str, list[str]] = {}
    for one in averages:
        where.setdefault(spell(wides[one]), []).append(share(one))
    cells = ". ".join(f"At {', '.join(shares)}: {text}" for text, shares in where.items())
    yield Picture(
        name,
        title,
        "Image AUROC of the raw training; every data set counts the same; standard deviation over seeds. Only cells "
        f"that all models of a group have. {cells}. Bars begin at chance, 50 %.",
        figure,
    )


def against_contamination(rows: pd.DataFrame, style: Style) -> Iterator[Picture]:
    """Image AUROC against contamination: a panel for each data set, and one for their average."""
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


def _bars(
    axes: Axes, places: Sequence[float], means: pd.Series, spreads: pd.Series, width: float, name: str, look: dict
) -> None:
    axes.bar(
        places, means, width, yerr=spreads.fillna(0), label=name, edgecolor="white", linewidth=0.5,
        error_kw={"elinewidth": 1, "ecolor": "#222222"}, **look,
    )  # fmt: skip


def _from_chance(axes: Sequence[Axes]) -> None:
    """Bars begin at chance, or at less where a figure is below that."""
    lowest = np.nanmin([_CHANCE, *(bar.get_height() for ax in axes for bar in ax.patches)])
    for ax in axes:
        ax.set_ylim(np.floor(lowest / 10) * 10, 100)


def _none_is_zero(deviation: float) -> float:
    return 0.0 if pd.isna(deviation) else deviation


def _digits(contamination: float) -> str:
    """For the name of a file: ``"40"``, ``"12_5"``."""
    return f"{100 * contamination:.4g}".replace(".", "_")


_FIGURES = (paper_bars, against_contamination, overall, by_class)


def write(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Write all figures as SVG and PNG, and a README.md with their captions and the published figures.

    Args:
        rows (pd.DataFrame): From `read_results`.
        folder (Path): Made if it does not exist. Results with several protocols get a folder each.

    Returns:
        list[Path]: All files.
    """
    rows = checked(rows)
    style, parts, written = Style.of(rows), scenarios(rows), []
    for scenario, part in parts.items():
        place = folder / scenario.slug if len(parts) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        text = [f"# Figures: {scenario}"]
        with look():
            for picture in (picture for draw in _FIGURES for picture in draw(part, style)):
                written += picture.save(place)
                text.append(f"**{picture.title}.** {picture.caption}")
                if picture.figure is not None:
                    text.append(f"![{picture.title}]({picture.name}.svg)\n\n([PNG]({picture.name}.png))")
        text.append(published_table(part, scenario).markdown())
        written.append(place / "README.md")
        written[-1].write_text("\n\n".join(text), encoding="utf-8")
    return written


def main() -> None:
    """Parse, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="CSV", help="result files of `metarefine bench`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if it does not exist")
    options = parser.parse_args()
    print(f"{len(write(read_results(*options.results), options.out))} files in {options.out}")


if __name__ == "__main__":
    main()
