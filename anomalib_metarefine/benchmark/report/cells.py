"""Rows of result files: checked, split by how images were made dirty, and averaged over cells that models share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from anomalib_metarefine.benchmark.table import COLUMNS, KEY, label

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REFINED, UNREFINED = "MetaRefine", "MetaRefine, unrefined"  # names of models, as the configurations have them
CELL = ["data", "category", "seed"]
_PLACE = ["data", "category"]
_DIRT = ["protocol", "overlap"]
_IDENTITY = [name for name in KEY if name not in {"image_size", "train_images", "backbone", "settings"}]  # of a cell
_TEXTS = ["category", "settings", "backbone", "reason", "versions", "machine", "date", *_DIRT]
_FIGURES = [name for name in COLUMNS[COLUMNS.index("image_AUROC") : COLUMNS.index("reason")] if "test_" not in name]
_FIGURES += ["test_seconds"]


class Scenario(NamedTuple):
    """How training images were made dirty; what differs in it is never put into one table."""

    protocol: str
    overlap: str

    @property
    def slug(self) -> str:
        """A name for a folder."""
        return "-".join(self)

    def __str__(self) -> str:
        how = {"replace": "dirty images take the place of good ones", "add": "dirty images are added to the good ones"}
        test = {"no-overlap": "they are not in the test set", "overlap": "they are in the test set, too"}
        return f"{how.get(self.protocol, self.protocol)}; {test.get(self.overlap, self.overlap)}"


def checked(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that can be put into tables, in an order that does not depend on the order of the files.

    Args:
        rows (pd.DataFrame): Columns of `table.Row`, as they are read from one or several CSV files.

    Returns:
        pd.DataFrame: The same with empty texts for missing ones, and no figures where there is a ``reason``. Of the
            rows of one cell one is left: one that ran, if any did, and the latest of those.

    Raises:
        ValueError: If columns are missing, there are no rows, or rows of one data set or model do not belong together:
            other image sizes or training set sizes, another backbone, other settings.
    """
    missing = [name for name in COLUMNS if name not in rows]
    if missing or rows.empty:
        msg = (
            f"These are no results of `metarefine bench`: columns {', '.join(missing)} are missing."
            if missing
            else "There are no results yet. `metarefine bench CONFIG` makes some."
        )
        raise ValueError(msg)
    rows = rows[COLUMNS].copy()
    rows[_TEXTS] = rows[_TEXTS].fillna("").astype(str)
    rows[_FIGURES] = rows[_FIGURES].astype(float)
    rows["contamination"] = rows.contamination.astype(float).round(6)
    failed = rows.reason != ""
    rows.loc[failed, _FIGURES] = float("nan")
    # What failed with other settings, and was tried again, is mixed with nothing.
    _refuse_mixtures(rows[~failed], _PLACE, ["image_size", "train_images"])
    _refuse_mixtures(rows[~failed], [*_PLACE, "model"], ["backbone", "settings"])
    rest = [name for name in COLUMNS if name not in {*_IDENTITY, "date"}]
    rows = rows.assign(ran=~failed).sort_values([*_IDENTITY, "ran", "date", *rest])
    return rows.drop_duplicates(_IDENTITY, keep="last")[COLUMNS].reset_index(drop=True)


def _refuse_mixtures(rows: pd.DataFrame, key: list[str], same: list[str]) -> None:
    for name in same:
        counts = rows.groupby(key)[name].nunique()
        if (counts > 1).any():
            first = counts.index[counts > 1][0]
            found = rows[(rows[key] == list(first)).all(axis=1)][name].unique()
            what = " ".join([label(*first[:2]), *first[2:]])
            msg = (
                f"{what} is in the results with more than one {name}: {' and '.join(sorted(map(str, found)))}. Rows "
                "of both can't be averaged or compared: leave one of them out, or give it another name and run it anew."
            )
            raise ValueError(msg)


def scenarios(rows: pd.DataFrame) -> dict[Scenario, pd.DataFrame]:
    """Rows by how images were made dirty. Clean training sets, which the benchmark runs once, belong to each.

    Args:
        rows (pd.DataFrame): From `checked`.

    Returns:
        dict[Scenario, pd.DataFrame]: Sorted by name.
    """
    is_clean = rows.contamination == 0
    found = (rows if is_clean.all() else rows[~is_clean])[_DIRT].drop_duplicates().sort_values(_DIRT)
    parts = {}
    for scenario in map(Scenario._make, found.itertuples(index=False)):
        own = (rows[_DIRT] == list(scenario)).all(axis=1)
        # Its own clean rows before those of others, and of two the one that ran.
        part = rows[own | is_clean].assign(own=own, ran=rows.reason == "")
        part = part.sort_values(["ran", "own"], ascending=False, kind="stable").drop(columns=["own", "ran"])
        part = part.drop_duplicates([name for name in _IDENTITY if name not in _DIRT])
        parts[scenario] = part.sort_values(KEY).reset_index(drop=True)
    return parts


def model_order(models: Iterable[str]) -> list[str]:
    """MetaRefine first, then the others by name."""
    return sorted(set(models), key=lambda model: (model != REFINED, model != UNREFINED, model.casefold(), model))


def share(contamination: float) -> str:
    """A contamination as a person writes it.

    Example:
        >>> share(0.125), share(0.4)
        ('12.5 %', '40 %')
    """
    return f"{100 * contamination:.4g} %"


def with_training_seconds(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of raw trainings that ran, with ``training_seconds``: fitting, and the features where they are shared."""
    raw = rows[(rows.training == "raw") & (rows.reason == "")]
    return raw.assign(training_seconds=raw.fit_seconds + raw.feature_seconds.fillna(0))


def on_machine(machine: str, jobs: int) -> str:
    """A machine in words.

    Example:
        >>> on_machine("2 cores, x86", 2)
        '2 cores, x86, shared by 2 processes'
    """
    name = machine or "a machine that was not named"
    return name if int(jobs) == 1 else f"{name}, shared by {jobs} processes"


def common_cells(rows: pd.DataFrame, figure: str, lines: Sequence[str], cell: Sequence[str] = CELL) -> pd.DataFrame:
    """The cells where everything that is compared has a figure: averages over others would compare unlike things.

    Args:
        rows (pd.DataFrame): From `checked`, of one scenario.
        figure (str): Column to average.
        lines (Sequence[str]): Columns that tell apart what is compared, e.g. ``["model"]``.
        cell (Sequence[str]): Columns that make a cell; `lines` and they must tell all rows apart.

    Returns:
        pd.DataFrame: ``[cells x lines]`` without gaps. Lines without any figure are not there.
    """
    wide = rows.pivot(index=list(cell), columns=list(lines), values=figure)
    wide = wide.dropna(axis="columns", how="all").dropna()
    return wide if len(wide.columns) else wide.iloc[:0]


class Average(NamedTuple):
    """Mean over data sets, of means over their categories, of means over seeds; the spread is that over seeds."""

    mean: pd.Series  # one per line
    sd: pd.Series  # sample standard deviation of the averages of single seeds that have all cells; NaN for one
    seeds: int  # number of such seeds


def macro_average(wide: pd.DataFrame) -> Average:
    """Average in which every data set counts the same, and in a data set every category.

    Args:
        wide (pd.DataFrame): From `common_cells`; its index has the levels of `CELL`.

    Returns:
        Average: NaN if there are no cells.

    Example:
        >>> cells = pd.MultiIndex.from_tuples([("a", "x", 0), ("a", "y", 0), ("b", "", 0)], names=CELL)
        >>> float(macro_average(pd.DataFrame({"Padim": [0.5, 0.7, 0.8]}, cells)).mean["Padim"].round(3))
        0.7
    """
    mean = wide.groupby(_PLACE).mean().groupby("data").mean().mean()
    cells = wide.groupby("seed").size()
    has_all = cells.index[cells == len(wide.index.droplevel("seed").unique())]
    whole = wide[wide.index.get_level_values("seed").isin(has_all)]
    single = whole.groupby(["seed", *_PLACE]).mean().groupby(["seed", "data"]).mean().groupby("seed").mean()
    return Average(mean, single.std(), len(single))


def spell(wide: pd.DataFrame) -> str:
    """The cells of `common_cells` in words: ``"elpv-mono, mvtec_ad (15 categories); seeds 0, 1, 2"``."""
    index = wide.index.to_frame(index=False)
    names = []
    for data, part in index.groupby("data"):
        categories = part.category.unique()
        names.append(label(data, categories[0]) if len(categories) == 1 else f"{data} ({len(categories)} categories)")
    seeds = sorted(index.seed.unique())
    every = len(index.drop_duplicates(CELL)) == len(index.drop_duplicates(_PLACE)) * len(seeds)
    return f"{', '.join(names)}; seeds {', '.join(map(str, seeds))}{'' if every else ', not all everywhere'}"
