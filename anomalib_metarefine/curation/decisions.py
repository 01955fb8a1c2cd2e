"""A person's decisions: how they are remembered, and put above the rule's; `images.answers` reads them."""

from __future__ import annotations

import getpass
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from filelock import FileLock

from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.images.answers import DECISIONS_FILE, MEANING, Answer, load
from anomalib_metarefine.images.sources import listing
from anomalib_metarefine.images.storage import is_remote
from anomalib_metarefine.images.tables import table_text

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOCK_WAIT_S = 10  # for another process that appends: a matter of milliseconds


def decide(manifest: Manifest, decisions: pd.DataFrame) -> Manifest:
    """Override the rule with a person's decisions.

    An image is found by its content, else by its path. A decision holds for every exact copy of the image.

    Args:
        manifest (Manifest): Stays as it is.
        decisions (pd.DataFrame): As `read` gives them.

    Returns:
        Manifest: With ``decision``, ``decided_by`` "user", ``reason``, and ``round`` of the decided images
            changed.

    Raises:
        ValueError: If a decision is about an image that is not in the manifest, if two contradict each other, or if an
            image that can't be read is to be kept.
    """
    found = _find(manifest, decisions)
    table = manifest.table.copy()
    unreadable = [table.image_path[row] for row, new in found.items() if new == "keep" and not _readable(table, row)]
    if unreadable:
        msg = f"{len(unreadable)} images to keep can't be read: {listing(unreadable)}. "
        msg += "Repair the files, or reject them."
        raise ValueError(msg)
    new = pd.Series(found, dtype=object)
    old = table.decision[new.index]
    by = table.decided_by[new.index].eq("user").map({True: "a person", False: "the rule"})
    new = new[(old != new) | (by == "the rule")]  # saying the same again changes nothing
    table.loc[new.index, "reason"] = [f"A person said {new[i]}; {by[i]} said {old[i]}." for i in new.index]
    table.loc[new.index, "decision"] = new
    table.loc[new.index, "decided_by"] = "user"
    table.loc[new.index[new == "keep"], "round"] = 0
    return Manifest(table, dict(manifest.run))


def append(folder: str | Path, answers: Iterable[Answer]) -> Path:
    """Add answers to ``decisions.csv``. They are on the disk when this returns; earlier ones stay.

    Args:
        folder (str | Path): Output folder of ``metarefine curate``; made if it does not exist.
        answers (Iterable[Answer]): In the order given.

    Returns:
        Path: The file.

    Raises:
        OSError: If they can't be written; then the file is as it was.
        ValueError: If an answer is none, or a file of that name is of another kind.
    """
    now = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "by": _user()}
    filled = [Answer(*(text or now.get(name, "") for name, text in answer._asdict().items())) for answer in answers]
    wrong = [answer for answer in filled if answer.decision not in MEANING.values() or not answer.sha256]
    if wrong:
        msg = f"An answer has a sha256, and keep, reject or review as its decision; found {wrong[0]}."
        raise ValueError(msg)
    if is_remote(folder):  # it has neither locks nor appending
        msg = f"Answers are kept in a folder of this machine, not in {folder}. Copy it here, and curate into the copy."
        raise ValueError(msg)
    path = Path(folder) / DECISIONS_FILE
    if not filled:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(filled, columns=Answer._fields)
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_WAIT_S), path.open("a+b", buffering=0) as file:
        file.seek(0)
        content = file.read()
        header = table_text(table.head(0)).encode()
        if content and content.splitlines()[0] != header.strip():
            msg = f"{path} has other columns than {', '.join(Answer._fields)}. Rename it, and pass it as --decisions."
            raise ValueError(msg)
        start = b"\n" if content and not content.endswith(b"\n") else b""
        text = start + (b"" if content else header) + table_text(table, header=False).encode()
        try:
            if file.write(text) < len(text):
                msg = f"{path} can't take any more answers: the disk is full."
                raise OSError(msg)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(len(content))
            raise
    return path


def remember(folder: str | Path, manifest: Manifest, decisions: pd.DataFrame) -> Path:
    """Append decisions for the next run into this folder, each with the content of its image; known ones are left out.

    Args:
        folder (str | Path): Output folder of ``metarefine curate``.
        manifest (Manifest): Has the images that the decisions are about.
        decisions (pd.DataFrame): As `read` gives them.

    Returns:
        Path: ``decisions.csv``.

    Raises:
        ValueError: As `decide` and `append`.
    """
    known = load(folder)
    found = _find(manifest, decisions)
    table = manifest.table
    answers = [Answer(table.image_path[row], table.sha256[row], decision) for row, decision in found.items()]
    # A file without content can't be recognised.
    return append(folder, [a for a in answers if a.sha256 and known.get(a.sha256) != a.decision])


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user need not have a name
        return ""


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
        msg = f"{len(unknown)} decisions are about images that are not in the manifest: {listing(unknown)}. "
        raise ValueError(msg + f"Paths are relative to {manifest.root}.")
    if contradictory:
        msg = f"{len(contradictory)} decisions contradict an earlier one about the same image, or an exact copy of it: "
        raise ValueError(msg + f"{listing(contradictory)}. Leave one of them.")
    return found
