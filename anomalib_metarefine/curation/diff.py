"""What is different between two manifests of the same folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from anomalib_metarefine.curation.manifest import Manifest


_USED = ["image_path", "decision", "reason"]
_COLUMNS = ["change", "image_path", "image_path_before", "decision_before", "decision", "reason"]


def diff(before: Manifest, after: Manifest) -> pd.DataFrame:
    """Compare two manifests.

    An image is found again by its content, and where that is new, by its path: a file that was moved or renamed is
    neither added nor removed.

    Args:
        before (Manifest): The earlier one.
        after (Manifest): The later one.

    Returns:
        pd.DataFrame: One row per image with another decision, added or removed, by path: ``change`` (decision, added,
            removed), ``image_path``, ``image_path_before``, ``decision_before``, ``decision``, ``reason`` (the later
            one's); empty where there is none.
    """
    old, new = before.table[_USED].add_suffix("_before"), after.table[_USED]
    rows_before, rows = _pairs(before.table, after.table)
    both = pd.concat([old.loc[rows_before].reset_index(drop=True), new.loc[rows].reset_index(drop=True)], axis=1)
    removed, added = old.drop(rows_before), new.drop(rows)
    parts = {
        "removed": removed.assign(image_path=removed.image_path_before),
        "added": added,
        "decision": both[both.decision_before != both.decision],
    }
    found = pd.concat(parts, names=["change"]).reset_index("change")
    return found.reindex(columns=_COLUMNS).fillna("").sort_values("image_path", ignore_index=True)


def _pairs(before: pd.DataFrame, after: pd.DataFrame) -> tuple[list[int], list[int]]:
    """Rows of the same image: same content and path, else same content, else same path; of several in their order."""
    pairs: tuple[list[int], list[int]] = ([], [])
    sides = [table[["sha256", "image_path"]] for table in (before, after)]
    for keys in (["sha256", "image_path"], ["sha256"], ["image_path"]):
        # What could not be read has no content to go by.
        known = [side[side.sha256 != ""] if keys == ["sha256"] else side for side in sides]
        old, new = (side[keys].assign(nth=side.groupby(keys).cumcount(), row=side.index) for side in known)
        same = old.merge(new, on=[*keys, "nth"])
        for k, rows in enumerate((same.row_x, same.row_y)):
            pairs[k].extend(rows)
            sides[k] = sides[k].drop(rows)
    return pairs
