"""What to ask a person, as a table to fill in: the way without a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from anomalib_metarefine.curation.manifest import Manifest


def template(manifest: Manifest, budget: int | None = None) -> pd.DataFrame:
    """A table to fill in: an empty column ``decision``, and what is known about each image, worst first.

    Args:
        manifest (Manifest): What was decided.
        budget (int | None): How many images the person will look at: those with the highest scores, whatever the rule
            says. ``None`` takes the images for review.

    Returns:
        pd.DataFrame: Without images that a person decided or that can't be read.

    Raises:
        ValueError: If the budget is below 1.
    """
    if budget is not None and budget < 1:
        msg = f"The budget must be at least 1 image, found {budget}."
        raise ValueError(msg)
    rows = manifest.table if budget is not None else manifest.rows("review")
    rows = rows[rows.decided_by == "rule"].sort_values("score", ascending=False, kind="stable", ignore_index=True)
    rows = rows.head(budget or len(rows))
    rows = rows.rename(columns={"decision": "decision_so_far"}).assign(decision="")
    return rows[["image_path", "decision", "decision_so_far", "score", "reason", "quality", "sha256"]]
