"""From rows of `table.Row` to the Markdown table that a person reads."""

from __future__ import annotations

import pandas as pd

from anomalib_metarefine.benchmark.markdown import head, line

_CELL = ["model", "data", "contamination"]
_TRAININGS = ["raw", "curated", "clean"]
_LEAST_GAP = 0.005  # image AUROC between raw and clean: below it there is nothing to recover, only noise to divide by

EFFICIENT_AD = (
    "EfficientAd is not in this table. anomalib's `EfficientAd` downloads the weights of its teacher, and the "
    "ImageNette images that every training step draws from. Without a network it stops before its first step; with "
    "other weights and images in their place it would be another model."
)


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """Image AUROC of the three trainings side by side, with the curation's own figures.

    Args:
        rows (pd.DataFrame): Columns of `table.Row`.

    Returns:
        pd.DataFrame: One row per model, data set, contamination and seed whose three trainings are all there, with
            ``raw``, ``curated``, ``clean``, ``rejected``, ``precision`` and ``recall``.

    Raises:
        ValueError: If a training is there in two settings or sizes, so that it is not clear which one is meant.
    """
    key = [*_CELL, "seed"]
    twice = rows[rows.duplicated([*key, "training"])]
    if not twice.empty:
        first = twice.iloc[0]
        msg = (
            f"{first.model} on {first.data} is in the table with more than one setting, image size or training set "
            "size. Sum up a table with one of each."
        )
        raise ValueError(msg)
    wide = rows.pivot_table(index=key, columns="training", values="image_AUROC").reindex(columns=_TRAININGS).dropna()
    found = rows[rows.training == "curated"].set_index(key)[["rejected", "train_images", "precision", "recall"]]
    return wide.join(found).reset_index()


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread over the seeds, and what curation was worth.

    Args:
        rows (pd.DataFrame): Columns of `table.Row`.

    Returns:
        pd.DataFrame: One row per model, data set and contamination: ``seeds``, mean and sample standard deviation of
            ``raw``, ``curated`` and ``clean`` (``raw_sd``, NaN for one seed), ``recovered`` (`recovered_share`),
            means of ``rejected``, ``precision`` and ``recall``.
    """
    groups = paired(rows).groupby(_CELL, sort=True)
    mean = groups[[*_TRAININGS, "rejected", "precision", "recall"]].mean()
    spread = groups[_TRAININGS].std().add_suffix("_sd")
    recovered = groups[_TRAININGS].apply(recovered_share).rename("recovered")
    return pd.concat([groups.size().rename("seeds"), mean, spread, recovered], axis=1).reset_index()


def recovered_share(pairs: pd.DataFrame) -> float:
    """Share of the gap between raw and clean training that curation closes, as a ratio of means.

    Args:
        pairs (pd.DataFrame): Columns ``raw``, ``curated``, ``clean``.

    Returns:
        float: Mean of curated - raw over mean of clean - raw; NaN where that gap is below 0.005, or there are no rows.

    Example:
        >>> recovered_share(pd.DataFrame({"raw": [0.8, 0.7], "curated": [0.9, 0.7], "clean": [0.9, 0.8]})).round(3)
        np.float64(0.5)
    """
    gap = (pairs.clean - pairs.raw).mean()
    # Written so that the NaN of no rows ends here too.
    return (pairs.curated - pairs.raw).mean() / gap if gap >= _LEAST_GAP else float("nan")


def markdown(rows: pd.DataFrame) -> str:
    """The summary as Markdown.

    Args:
        rows (pd.DataFrame): Columns of `table.Row`.

    Returns:
        str: A table of all cells, one of each model over all data sets, and what was run.
    """
    pairs = paired(rows)
    if pairs.empty:
        return "No model has been trained raw, curated and clean yet.\n"
    cells = summarise(rows)
    lines = [
        "Image AUROC, mean ± standard deviation over seeds; recovered: (curated - raw) / (clean - raw), a ratio of "
        f"means, left out where clean is not {_LEAST_GAP} above raw. Defective images are real, and are not in the "
        "test set.",
        "",
        head("model", "data", "dirty", "seeds", *_TRAININGS, "recovered", "rejected", "precision", "recall"),
    ]
    lines += [
        line(
            cell.model, cell.data, f"{cell.contamination:.0%}", str(cell.seeds),
            *(_spread(getattr(cell, name), getattr(cell, f"{name}_sd")) for name in _TRAININGS),
            _share(cell.recovered), f"{cell.rejected:.1f}", _number(cell.precision), _number(cell.recall),
        )
        for cell in cells.itertuples()
    ]  # fmt: skip
    lines += [
        "",
        "Over all data sets and seeds; lost on clean data: raw - curated at 0 %, in points of image AUROC.",
        "",
    ]
    shares = sorted(share for share in pairs.contamination.unique() if share > 0)
    titles = [f"recovered at {share:.0%}" for share in shares]
    lines.append(head("model", *titles, "recovered, all dirty", "lost on clean data"))
    for model, group in [*pairs.groupby("model", sort=True), ("all", pairs)]:
        dirty = group[group.contamination > 0]
        by_share = [_share(recovered_share(dirty[dirty.contamination == share])) for share in shares]
        clean = group[group.contamination == 0]
        lost = 100 * (clean.raw - clean.curated).mean()
        lines.append(line(str(model), *by_share, _share(recovered_share(dirty)), _number(lost)))
    return "\n".join([*lines, "", *_what_was_run(rows), "", EFFICIENT_AD, ""])


def _what_was_run(rows: pd.DataFrame) -> list[str]:
    data = rows.drop_duplicates(["data", "image_size", "train_images"])
    models = rows.drop_duplicates(["model", "settings"])
    return [
        "Data: "
        + "; ".join(f"{r.data} at {r.image_size}, {r.train_images} training images" for r in data.itertuples()),
        "",
        *(f"- {row.model}: {row.settings}" for row in models.sort_values("model").itertuples()),
        "",
        "Run with " + "; ".join(sorted(rows.versions.unique())) + ".",
    ]


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" if pd.isna(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def _share(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.0%}"


def _number(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.2f}"
