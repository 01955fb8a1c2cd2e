"""What a model costs: seconds, images per second, memory."""

from __future__ import annotations

import numpy as np
import pandas as pd

from anomalib_metarefine.benchmark.report.cells import CELL, model_order
from anomalib_metarefine.benchmark.report.typeset import Cell, Table

REFERENCE = "PaDiM"  # what the others are measured by; the first model if it is not there
_WHERE = [*CELL, "contamination"]
_PLAIN = ["fit_seconds", "feature_seconds", "test_seconds", "images_per_second", "peak_memory_mb", "model_mb"]


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


def costs(rows: pd.DataFrame) -> list[Table]:
    """Cost of raw training and of prediction: one table per machine, as seconds depend on it.

    Args:
        rows (pd.DataFrame): Of one scenario, from `cells.scenarios`.

    Returns:
        list[Table]: Medians over contaminations and seeds, and ratios to a reference model.
    """
    return [
        _on_machine(part, machine, jobs)
        for (machine, jobs), part in with_training_seconds(rows).groupby(["machine", "jobs"])
    ]


def _on_machine(rows: pd.DataFrame, machine: str, jobs: int) -> Table:
    models = model_order(rows.model)
    reference = REFERENCE if REFERENCE in models else models[0]
    body: list[list[Cell | str]] = []
    breaks = set()
    for data, of_data in rows.groupby("data"):
        breaks.add(len(body))
        own = of_data[of_data.model == reference].set_index([*_WHERE])
        for model in models:
            part = of_data[of_data.model == model].set_index([*_WHERE])
            if part.empty:
                continue
            middle = part[_PLAIN].median()
            ratios = [_ratio(part[name] / own[name]) for name in ("training_seconds", "images_per_second")]
            body.append([data, model, str(len(part)), *map(_number, middle[:4]), *ratios, *map(_number, middle[4:])])
    return Table(
        f"Cost on {on_machine(machine, jobs)}",
        ["data", "model", "cells", "fit, s", "features, s", "test, s", "images, 1/s", f"training, x {reference}",
         f"images/s, x {reference}", "peak memory, MB", "model, MB"],
        body,
        labels=2,
        text="Raw training, medians over contaminations and seeds. Features: one pass of the backbone, which models "
        "and trainings share in the benchmark; training is fit and features together. Images per second: predicted one "
        f"at a time, backbone included. Ratios to {reference} are medians over cells that both have, and depend less "
        "on the machine than seconds do. Peak memory: growth of the process's peak while fitting and testing.",
        breaks=breaks,
    )  # fmt: skip


def _ratio(ratios: pd.Series) -> str:
    """Of cells that only one of the two has, the ratio is NaN."""
    return _number(ratios.replace(np.inf, np.nan).median())


def _number(value: float) -> str:
    """Three digits; seconds and megabytes need no more."""
    if pd.isna(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
