"""How figures look, and how they are saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from anomalib_metarefine.benchmark.report.cells import model_order

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's palette: safe for colour-blind readers. Markers and hatches tell models apart in grey, too.
_COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
_HATCHES = ("", "//", "\\\\", "xx", "--", "||", "++", "/", "\\", "x")  # lines: circles make large files
_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "metarefine",  # or every file would differ from the last
}


def look() -> AbstractContextManager[None]:
    """Draw and save within this; what a user's matplotlibrc says is set aside."""
    return style.context(_RC, after_reset=True)


@dataclass(frozen=True)
class Picture:
    """A figure, or why there is none.

    Attributes:
        name (str): Of its files, without suffix.
        title (str): What it shows.
        caption (str): What to know to read it, or what is missing.
        figure (Figure | None): The figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None = None

    def save(self, folder: Path) -> list[Path]:
        """Write SVG and PNG, the same bytes every time.

        Args:
            folder (Path): It must exist.

        Returns:
            list[Path]: The files; none if there is no figure.
        """
        if self.figure is None:
            return []
        paths = [folder / f"{self.name}.svg", folder / f"{self.name}.png"]
        self.figure.savefig(paths[0], metadata={"Date": None, "Creator": None})
        self.figure.savefig(paths[1], dpi=120, metadata={"Software": None})
        return paths


@dataclass(frozen=True)
class Style:
    """How each model looks, the same in all figures.

    Attributes:
        models (tuple[str, ...]): All models of the results that ran, in the order of the legend.
    """

    models: tuple[str, ...]

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Style:
        """The style of the models that have figures."""
        return cls(tuple(model_order(rows[rows.reason == ""].model)))

    def line(self, model: str) -> dict[str, object]:
        """Colour and marker; hollow where a colour comes up again. The first of the models lies on top."""
        place = self.models.index(model)
        look = {"color": _COLOURS[place % len(_COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
        look["zorder"] = 3 - place / 100
        return look if place < len(_COLOURS) else look | {"markerfacecolor": "white"}

    def bar(self, model: str) -> dict[str, object]:
        """Colour and hatch."""
        place = self.models.index(model)
        return {"color": _COLOURS[place % len(_COLOURS)], "hatch": _HATCHES[place % len(_HATCHES)]}


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **shared: object) -> tuple[Figure, np.ndarray]:
    """An empty figure that no window knows of, to be drawn within `look`.

    Args:
        width (float): In inches.
        height (float): In inches.
        rows (int): Rows of axes.
        columns (int): Columns of axes.
        **shared (object): ``sharex``, ``sharey``.

    Returns:
        tuple[Figure, np.ndarray]: The figure and its axes ``[rows x columns]``.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def legend(figure: Figure, axes: Axes) -> None:
    """One legend for the whole figure, below it; of what has the same name, the first."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(reversed(labels), reversed(handles), strict=True))
    names = list(dict.fromkeys(labels))
    columns = min(max(3, int(figure.get_figwidth() / 1.9)), len(names))
    handles = [named[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
