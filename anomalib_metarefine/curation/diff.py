"""What is different between two manifests of the same folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from anomalib_metarefine.curation.manifest import Manifest


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
    old, new = before.table, after.table
    pairs = _pairs(old, new)
    removed = old.index.difference([i for i, _ in pairs])
    added = new.index.difference([j for _, j in pairs])
    rows = [("removed", old.image_path[i], old.image_path[i], old.decision[i], "", "") for i in removed]
    rows += [("added", new.image_path[j], "", "", new.decision[j], new.reason[j]) for j in added]
    rows += [
        ("decision", new.image_path[j], old.image_path[i], old.decision[i], new.decision[j], new.reason[j])
        for i, j in pairs
        if old.decision[i] != new.decision[j]
    ]
    columns = ["change", "image_path", "image_path_before", "decision_before", "decision", "reason"]
    return pd.DataFrame(rows, columns=columns).sort_values("image_path", ignore_index=True)


def _pairs(old: pd.DataFrame, new: pd.DataFrame) -> list[tuple[int, int]]:
    """Rows of the same image: same content and path, else same content, else same path."""
    pairs: list[tuple[int, int]] = []
    left, right = dict.fromkeys(old.index), dict.fromkeys(new.index)  # in order, and quick to remove from
    for columns in (["sha256", "image_path"], ["sha256"], ["image_path"]):
        old_keys, new_keys = (list(table[columns].itertuples(index=False, name=None)) for table in (old, new))
        waiting: dict[tuple[str, ...], list[int]] = {}
        for j in right:
            waiting.setdefault(new_keys[j], []).append(j)
        for i in list(left):
            same = waiting.get(old_keys[i])
            if same and old_keys[i] != ("",):  # what could not be read has no content to go by
                pairs.append((i, same.pop(0)))
                del left[i], right[pairs[-1][1]]
    return pairs
