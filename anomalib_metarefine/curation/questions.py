"""What to ask a person: the images whose labels help most, as a table to fill in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.curation.manifest import Manifest


def propose(manifest: Manifest, budget: int, groups: dict[str, int] | None = None) -> list[str]:
    """The images whose labels are expected to correct most decisions.

    Images that are not rejected come first, the likelier dirty the sooner: the fence is strict, so what it missed lies
    just inside. Of 20 images so chosen, 2 to 5 times as many were decided wrongly as of 20 drawn at random, and more
    than of the 20 with the least certain probability (docs/results.md). Within a group of look-alikes, one answer tells
    something about the others: the gain of the n-th question about a group is divided by n. Where the budget goes
    beyond, rejected images follow, the likelier clean the sooner. Images that a person decided, or that can't be read,
    are left out.

    Args:
        manifest (Manifest): What was decided.
        budget (int): How many images the person will look at.
        groups (dict[str, int] | None): Group of look-alikes by ``image_path``; images without, or in -1, stand alone.

    Returns:
        list[str]: ``image_path`` of at most ``budget`` images, most helpful first.

    Raises:
        ValueError: If the budget is below 1.

    References:
        Settles, "Active Learning Literature Survey", 2009 (on the redundancy of questions asked in batches).
    """
    if budget < 1:
        msg = f"The budget must be at least 1 image, found {budget}."
        raise ValueError(msg)
    table = manifest.table
    probability = table.dirty_probability[(table.decided_by == "rule") & table.dirty_probability.notna()]
    gain = probability.where(table.decision.loc[probability.index] != "reject", 1 - probability)
    group = table.image_path.map(groups or {}).where(lambda g: g >= 0)
    # Within a group the gains fall, and so do the discounted ones: sorting once is the same as choosing greedily.
    order = pd.DataFrame({"gain": gain, "group": group.loc[gain.index], "spread": table.uncertainty.loc[gain.index]})
    order["rejected"] = table.decision.loc[gain.index] == "reject"
    by_gain = {"by": ["rejected", "gain", "spread"], "ascending": [True, False, False], "kind": "stable"}
    order = order.sort_values(**by_gain)
    asked = order.groupby("group").cumcount().where(order.group.notna(), 0)
    order["gain"] /= 1 + asked
    chosen = order.sort_values(**by_gain).index[:budget]
    return table.image_path.loc[chosen].tolist()


def template(manifest: Manifest, image_paths: Sequence[str] | None = None) -> pd.DataFrame:
    """A table to fill in: an empty column ``decision``, and what is known about each image.

    Args:
        manifest (Manifest): What was decided.
        image_paths (Sequence[str] | None): Images to ask about, in this order; ``None`` takes the review queue.
    """
    paths = list(manifest.rows("review").image_path if image_paths is None else image_paths)
    rows = manifest.table.set_index("image_path").loc[paths].reset_index()
    rows = rows.rename(columns={"decision": "decision_so_far"}).assign(decision="")
    columns = ["image_path", "decision", "decision_so_far", "dirty_probability", "score", "reason", "quality", "sha256"]
    return rows[columns]
