"""Figures that others have published, beside ours."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from anomalib_metarefine.benchmark.report.cells import (
    CELL,
    REFINED,
    Scenario,
    common_cells,
    macro_average,
    share,
    spell,
)
from anomalib_metarefine.benchmark.report.tables import IMAGE_AUROC, spread
from anomalib_metarefine.benchmark.report.typeset import Cell, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


def read_published() -> Mapping[str, Any]:
    """``published.yaml``: ``data_sets`` and ``figures``."""
    return yaml.safe_load(files(__package__).joinpath("published.yaml").read_text(encoding="utf-8"))


def published_table(rows: pd.DataFrame, scenario: Scenario) -> Table:
    """What others state, and what our raw training gave on the same data at the same contamination.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        scenario (Scenario): Which it is.

    Returns:
        Table: A row per published figure. Ours are empty where there are none, with the command that would fill them.
    """
    content = read_published()
    raw = rows[rows.training == "raw"]
    body: list[list[Cell | str]] = []
    breaks, previous = set(), None
    for figure in content["figures"]:
        if figure["method"] != previous:
            breaks.add(len(body))
            previous = figure["method"]
        data_set = content["data_sets"][figure["data_set"]]
        body.append([*_theirs(figure, data_set), *_ours(raw, figure, data_set)])
    return Table(
        "Published figures of other methods",
        ["method", "arXiv", "data", "dirty", "protocol", "metric", "published", "the method, run here", REFINED],
        body,
        labels=6,
        text="Published figures are copied from the papers: other backbones, image sizes and draws of dirty images, so "
        "they are no ranking. Empty: not known, or not run. Run here: trained on everything in the folder, in per "
        f"cent, mean ± standard deviation over seeds; {scenario}.",
        breaks=breaks,
    )


def _theirs(figure: Mapping[str, Any], data_set: Mapping[str, Any]) -> list[Cell | str]:
    dirty = "" if figure["contamination"] is None else share(figure["contamination"])
    texts = [figure[name] or "" for name in ("protocol", "metric")]
    value = Cell(str(figure["value"]), note=figure["note"] or "")
    return [figure["method"], figure["arxiv"] or "", data_set["name"], dirty, *texts, value]


def _ours(raw: pd.DataFrame, figure: Mapping[str, Any], data_set: Mapping[str, Any]) -> list[Cell]:
    """Figures of the same method and of MetaRefine, on the same cells."""
    name, models = figure["data_set"], [figure["method"], REFINED]
    if figure["contamination"] is None:
        return [Cell(""), Cell("", note="Which of our contaminations to compare with is not known.")]
    same = raw[(raw.data == name) & (raw.contamination == figure["contamination"]) & raw.model.isin(models)]
    wide = common_cells(same, IMAGE_AUROC.column, ["model"])
    if wide.empty:
        command = f"metarefine bench {data_set['config']} --root {name}=DIR"
        return [Cell(""), Cell("", note=f"To be filled by: {command}")]
    average = macro_average(wide)
    categories = len(wide.reset_index()[CELL[:2]].drop_duplicates())
    few = categories < data_set["categories"]
    note = f"Over {spell(wide)}." + (f" Of {data_set['categories']} categories, so not comparable." if few else "")
    own, ours = (Cell(spread(average.mean[m], average.sd[m]) if m in wide else "") for m in models)
    return [own, Cell(ours.text, note=note)]
