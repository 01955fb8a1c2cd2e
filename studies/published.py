"""Figures that others have published, beside ours."""

from __future__ import annotations

from pathlib import Path
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
from anomalib_metarefine.benchmark.report.tables import IMAGE_AUROC
from anomalib_metarefine.benchmark.report.typeset import Notes, Table, spread

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

HERE = "the method, run here"
_ALIKE = 0.01  # shares of dirty images that are put side by side


def read_published() -> Mapping[str, Any]:
    """``published.yaml``: ``data_sets``, ``protocols`` and ``figures``."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def published_table(rows: pd.DataFrame, scenario: Scenario) -> Table:
    """What others state, and what our raw training gave on the same data at the same share of dirty images.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.
        scenario (Scenario): Which it is.

    Returns:
        Table: A row per published figure. Ours are empty where there are none, with the command that would fill them.
    """
    content = read_published()
    raw, notes, lines = rows[rows.training == "raw"], Notes(), []
    for figure in content["figures"]:
        data_set = content["data_sets"][figure["data_set"]]
        protocol = figure["protocol"]
        lines.append(
            {
                "method": figure["method"],
                "arXiv": figure["arxiv"],
                "data": data_set["name"],
                "protocol": notes.mark(protocol, content["protocols"][protocol.partition(":")[0]]),
                "dirty": share(figure["contamination"]),
                "published": notes.mark(str(figure["value"]), figure.get("note", "")),
                **_ours(raw, figure, data_set, notes),
            }
        )
    return Table(
        "Published figures of other methods",
        lines,
        "Image AUROC in per cent. Published figures are copied from the papers: other backbones, image sizes, "
        "protocols and draws of dirty images, so they are no ranking. Dirty: share of the training set that is "
        f"defective. Run here: trained on everything in the folder, mean ± standard deviation over seeds; {scenario}.",
        notes,
    )


def _ours(raw: pd.DataFrame, figure: Mapping[str, Any], data_set: Mapping[str, Any], notes: Notes) -> dict[str, str]:
    """Figures of the same method and of MetaRefine, on the same cells."""
    name, models = figure["data_set"], [figure["method"], REFINED]
    near = (raw.contamination - figure["contamination"]).abs() < _ALIKE
    same = raw[(raw.data == name) & near & raw.model.isin(models)]
    wide = common_cells(same, IMAGE_AUROC.column, ["model"])
    if wide.empty:
        command = f"`metarefine bench {data_set['config']} --root {name}=DIR`"
        note = f"To be filled by {command}, with this share in the file." if data_set["config"] else ""
        return {HERE: "", REFINED: notes.mark("", note)}
    average = macro_average(wide)
    categories = len(wide.reset_index()[CELL[:2]].drop_duplicates())
    few = categories < data_set["categories"]
    note = f"Over {spell(wide)}." + (f" Of {data_set['categories']} categories, so not comparable." if few else "")
    own, ours = (spread(average.mean[m], average.sd[m]) if m in wide else "" for m in models)
    return {HERE: own, REFINED: notes.mark(ours, note)}
