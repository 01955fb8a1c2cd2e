"""A person's decisions: what to ask, how to read the answers, and how they are remembered."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from anomalib_metarefine.curation.manifest import Manifest, write_text
from anomalib_metarefine.images.sources import read_table, some
from anomalib_metarefine.refinement.posterior import estimate_contamination, further_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

DECISIONS_FILE = "decisions.csv"

# What people write. A blank cell, and "review", leave the image undecided.
_MEANING = {
    **dict.fromkeys(("keep", "good", "ok", "clean", "normal"), "keep"),
    **dict.fromkeys(("reject", "bad", "ng", "dirty", "defective", "anomalous"), "reject"),
}
_UNDECIDED = ("", "review")


def review_queue(manifest: Manifest) -> pd.DataFrame:
    """The images for a person to look at, most uncertain first.

    Args:
        manifest (Manifest): What was decided.

    Returns:
        pd.DataFrame: Rows of the manifest, dirty probability nearest to one half first; among equals, the larger spread
            of the score first.
    """
    return manifest.rows("review").reset_index(drop=True)


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
    paths = list(review_queue(manifest).image_path if image_paths is None else image_paths)
    rows = manifest.table.set_index("image_path").loc[paths].reset_index()
    rows = rows.rename(columns={"decision": "decision_so_far"}).assign(decision="")
    columns = ["image_path", "decision", "decision_so_far", "dirty_probability", "score", "reason", "quality", "sha256"]
    return rows[columns]


def read_decisions(path: str | Path) -> pd.DataFrame:
    """Read a person's decisions.

    Args:
        path (str | Path): CSV or Parquet with ``decision`` and at least one of ``image_path`` and ``sha256``. Decisions
            are keep (also: good, ok, clean, normal) and reject (also: bad, ng, dirty, defective, anomalous), in any
            case. Rows with a blank, or with review, are left out: nothing is decided there.

    Returns:
        pd.DataFrame: ``sha256``, ``image_path`` (one of them may be empty), ``decision`` (keep or reject).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing or a decision is not understood, or if the file is a whole manifest, where
            nothing tells a person's decisions from the rule's.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"There are no decisions at {path}. Expected a CSV file with image_path or sha256, and decision."
        raise FileNotFoundError(msg)
    table = read_table(path)
    if "decided_by" in table:
        msg = f"{path} is a manifest. Pass a file with only the images that a person decided on."
        raise ValueError(msg)
    if "decision" not in table or not {"image_path", "sha256"} & set(table):
        msg = f"{path} needs a column decision, and image_path or sha256; found {some(list(table.columns))}."
        raise ValueError(msg)
    table = table.reindex(columns=["sha256", "image_path", "decision"]).fillna("").astype(str)
    answers = table.decision.str.strip().str.lower()
    strange = ~answers.isin([*_MEANING, *_UNDECIDED])
    if strange.any():
        msg = f"{path} has decisions that are not understood: {some(sorted(set(table.decision[strange])))}. "
        raise ValueError(msg + f"Write one of {', '.join(_MEANING)}, or nothing.")
    table = table.assign(decision=answers.map(_MEANING), sha256=table.sha256.str.strip().str.lower())
    table = table[answers.isin(list(_MEANING))].reset_index(drop=True)
    nameless = (table.sha256 == "") & (table.image_path == "")
    if nameless.any():
        msg = f"{path} has {int(nameless.sum())} decisions with neither image_path nor sha256."
        raise ValueError(msg)
    return table


def decide(manifest: Manifest, decisions: pd.DataFrame) -> Manifest:
    """Override the rule with a person's decisions.

    An image is found by its content, else by its path. A decision holds for every exact copy of the image.

    Args:
        manifest (Manifest): Stays as it is.
        decisions (pd.DataFrame): As `read_decisions` gives them.

    Returns:
        Manifest: With ``decision``, ``decided_by`` "user", ``reason``, ``round`` and ``dirty_probability`` of the
            decided images changed, and the contamination estimated anew.

    Raises:
        ValueError: If a decision is about an image that is not in the manifest, if two contradict each other, or if an
            image that can't be read is to be kept.
    """
    found = _find(manifest, decisions)
    table = manifest.table.copy()
    unreadable = [table.image_path[row] for row, new in found.items() if new == "keep" and not _readable(table, row)]
    if unreadable:
        msg = f"{len(unreadable)} images to keep can't be read: {some(unreadable)}. Repair the files, or reject them."
        raise ValueError(msg)
    new = pd.Series(found, dtype=object)
    old, by = (
        table.decision[new.index],
        table.decided_by[new.index].eq("user").map({True: "a person", False: "the rule"}),
    )
    new = new[(old != new) | (by == "the rule")]  # saying the same again changes nothing
    table.loc[new.index, "reason"] = [f"A person said {new[i]}; {by[i]} said {old[i]}." for i in new.index]
    table.loc[new.index, "decision"] = new
    table.loc[new.index, "decided_by"] = "user"
    table.loc[new.index[new == "keep"], "round"] = 0
    return _with_estimate(table, dict(manifest.run))


def _with_estimate(table: pd.DataFrame, run: dict[str, Any]) -> Manifest:
    """The manifest with the contamination that its scores and all of a person's decisions speak for."""
    scored = table[table.score.notna()]
    decided = scored.decided_by.eq("user").to_numpy()
    if decided.any() and run.get("contamination"):
        known = {int(place): scored.decision.iloc[place] == "keep" for place in decided.nonzero()[0]}
        further = further_scales({name.removeprefix("score_"): scored[name].to_numpy() for name in scored})
        posterior = estimate_contamination(scored.score.to_numpy(), run.get("seed", 0), known, further)
        run["contamination"] = posterior.summary()
        rows = scored.index[decided]
        table.loc[rows, "dirty_probability"] = scored.decision[rows].eq("reject").astype(float)
    return Manifest(table, run)


def remember(folder: str | Path, manifest: Manifest, decisions: pd.DataFrame) -> Path:
    """Add decisions to ``decisions.csv``, for the next run into this folder; about the same content, the last one wins.

    Args:
        folder (str | Path): Output folder of ``metarefine curate``.
        manifest (Manifest): Has the images that the decisions are about.
        decisions (pd.DataFrame): As `read_decisions` gives them.

    Returns:
        Path: The file, with ``sha256``, ``image_path``, ``decision`` and ``decided_at`` (ISO 8601, UTC).

    Raises:
        ValueError: As `decide`.
    """
    found = _find(manifest, decisions)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = manifest.table.loc[list(found), ["sha256", "image_path"]]
    rows = rows.assign(decision=list(found.values()), decided_at=now)
    rows = rows[rows.sha256 != ""]  # a file without content can't be recognised
    path = Path(folder) / DECISIONS_FILE
    if path.is_file():
        rows = pd.concat([_remembered(path), rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, rows.drop_duplicates("sha256", keep="last").sort_values("image_path").to_csv(index=False))
    return path


def load_remembered(folder: str | Path) -> dict[str, str]:
    """What `remember` wrote: keep or reject, by the SHA-256 of the image; empty if nobody decided anything yet.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / DECISIONS_FILE
    if not path.is_file():
        return {}
    table = _remembered(path)
    return dict(zip(table.sha256, table.decision, strict=True))


def _remembered(path: Path) -> pd.DataFrame:
    table = read_table(path)
    expected = ["sha256", "image_path", "decision", "decided_at"]
    if list(table.columns) != expected or not table.decision.isin(["keep", "reject"]).all():
        msg = f"{path} is damaged: expected the columns {', '.join(expected)}, and keep or reject. Repair or delete it."
        raise ValueError(msg)
    return table


def _readable(table: pd.DataFrame, row: int) -> bool:
    return table.decided_by[row] != "unreadable" and table.sha256[row] != ""


def _find(manifest: Manifest, decisions: pd.DataFrame) -> dict[int, str]:
    """New decision by row of the manifest."""
    table = manifest.table
    copies = {sha256: list(rows) for sha256, rows in table.groupby("sha256").groups.items() if sha256}
    row_of = {path: row for row, path in enumerate(table.image_path)}
    found: dict[int, str] = {}
    unknown, contradictory = [], []
    for sha256, path, new in decisions[["sha256", "image_path", "decision"]].itertuples(index=False):
        rows = copies.get(sha256)
        if rows is None and path in row_of:
            rows = copies.get(table.sha256[row_of[path]], [row_of[path]])
        if rows is None:
            unknown.append(path or sha256)
        elif found.get(rows[0], new) != new:
            contradictory.append(table.image_path[rows[0]])
        else:
            found.update(dict.fromkeys(rows, new))
    if unknown:
        msg = f"{len(unknown)} decisions are about images that are not in the manifest: {some(unknown)}. "
        raise ValueError(msg + f"Paths are relative to {manifest.root}.")
    if contradictory:
        msg = f"{len(contradictory)} decisions contradict an earlier one about the same image, or an exact copy of it: "
        raise ValueError(msg + f"{some(contradictory)}. Leave one of them.")
    return found
