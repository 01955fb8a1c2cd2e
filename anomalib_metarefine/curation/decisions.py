"""A person's decisions: how they are read, remembered, and put above the rule's.

There is one format. ``decisions.csv`` in an output folder has one line an answer, ``image_path, sha256, decision, when,
by``, and only grows: of several answers about an image the last one counts, the earlier ones are its history. A file
that a person fills in is read the same way; there ``when`` and ``by`` are missing, and answers must not contradict.
"""

from __future__ import annotations

import getpass
import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from filelock import FileLock

from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.images.sources import listing
from anomalib_metarefine.images.tables import read_table, table_text

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger(__name__)

DECISIONS_FILE = "decisions.csv"

# What people write, without dots and spaces (i.O. and n.i.O. are German for in and not in order). 0 and 1 as in
# anomalib's labels: 1 is anomalous. "review" takes an earlier answer back, a blank cell is none.
MEANING = {
    **dict.fromkeys(("keep", "good", "ok", "clean", "normal", "io", "pass", "passed", "0"), "keep"),
    **dict.fromkeys(("reject", "bad", "ng", "nok", "notok", "nio", "fail", "failed", "1"), "reject"),
    **dict.fromkeys(("dirty", "defect", "defective", "anomalous"), "reject"),
    "review": "review",
}
_LOCK_WAIT_S = 10  # for another process that appends: a matter of milliseconds


class Answer(NamedTuple):
    """One line of ``decisions.csv``."""

    image_path: str  # relative to the root
    sha256: str  # of the image's content, by which it is known again
    decision: str  # keep or reject; review takes an earlier answer back
    when: str = ""  # ISO 8601, UTC; filled in by `append` where it is empty
    by: str = ""  # who; filled in by `append` with the name of the user where it is empty


def read(path: str | Path) -> pd.DataFrame:
    """Read a person's decisions: ``decisions.csv`` of an output folder, a filled-in `template`, any such table.

    Args:
        path (str | Path): CSV or Parquet with ``decision`` and at least one of ``image_path`` and ``sha256``. Decisions
            are keep (also: good, ok, clean, normal, i.O., pass, 0) and reject (also: bad, ng, nok, n.i.O., fail,
            dirty, defective, anomalous, 1), in any case. Rows with a blank are left out: nothing is decided there.

    Returns:
        pd.DataFrame: ``sha256``, ``image_path`` (one of them may be empty), ``decision`` (keep or reject): the last
            answer about each image. Where people disagree, a warning names the images.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing, a decision is not understood or contradicts another one without saying when,
            or if the file is a whole manifest, where nothing tells a person's decisions from the rule's.
    """
    final = _final(Path(path))
    return final.loc[final.decision != "review", ["sha256", "image_path", "decision"]].reset_index(drop=True)


def _final(path: Path) -> pd.DataFrame:
    """The last answer about each image, those taken back among them."""
    if not path.is_file():
        msg = f"There are no decisions at {path}. Expected a CSV file with image_path or sha256, and decision."
        raise FileNotFoundError(msg)
    table = read_table(path)
    if "decided_by" in table:
        msg = f"{path} is a manifest. Pass a file with only the images that a person decided on."
        raise ValueError(msg)
    if "decision" not in table or not {"image_path", "sha256"} & set(table):
        msg = f"{path} needs a column decision, and image_path or sha256; found {listing(list(table.columns))}."
        raise ValueError(msg)
    ours = tuple(table.columns) == Answer._fields
    table = table.reindex(columns=Answer._fields).fillna("").astype(str)
    words = table.decision.str.lower().str.replace(r"[\s.]", "", regex=True)
    strange = ~words.isin([*MEANING, ""])
    torn = strange & (table.when == "") & ours
    if torn.any():
        logger.warning("%s: %d lines were cut off while being written, and are left out.", path, torn.sum())
        table, words, strange = table[~torn], words[~torn], strange[~torn]
    if strange.any():
        rows = [f"{table.decision[row]!r} in row {row + 1}" for row in table.index[strange]]
        msg = f"{path} has decisions that are not understood: {listing(rows)}. "
        raise ValueError(msg + f"Write one of {', '.join(MEANING)}, or nothing.")
    table = table.assign(decision=words.map(MEANING), sha256=table.sha256.str.strip().str.lower())[words != ""]
    nameless = (table.sha256 == "") & (table.image_path == "")
    if nameless.any():
        msg = f"{path} has {int(nameless.sum())} decisions with neither image_path nor sha256."
        raise ValueError(msg)
    return _last_answers(path, table)


def _last_answers(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The last answer about each image; contradictions that nobody can have meant are an error."""
    image = table.sha256.where(table.sha256 != "", table.image_path)
    last = table.groupby(image)[["decision", "by"]].transform("last")
    overruled = table.decision != last.decision
    undated = overruled & (table.when == "")
    if undated.any():
        msg = f"{path} contradicts itself about {undated.sum()} images: {listing(_named(table[undated]))}. "
        raise ValueError(msg + "Leave one answer.")
    disagreed = table[overruled & (table.by != last.by)]
    if len(disagreed):
        names = listing(_named(disagreed))
        logger.warning("%s: people disagree about images (%s); the last answer counts.", path, names)
    return table[~image.duplicated(keep="last")]


def _named(answers: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(answers.image_path.where(answers.image_path != "", answers.sha256)))


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


def load(folder: str | Path) -> dict[str, str]:
    """What ``decisions.csv`` of an output folder holds: keep or reject, by the SHA-256 of the image.

    Returns:
        dict[str, str]: Empty if nobody decided anything yet.

    Raises:
        ValueError: If the file is damaged, or has answers without ``sha256``.
    """
    path = Path(folder) / DECISIONS_FILE
    if not path.is_file():
        return {}
    table = read(path)
    nameless = table.image_path[table.sha256 == ""].tolist()
    if nameless:
        msg = f"{path} has {len(nameless)} answers without sha256: {listing(nameless)}. "
        raise ValueError(msg + "Rename it, and pass it as --decisions, where the path is enough.")
    return dict(zip(table.sha256, table.decision, strict=True))


def taken_back(folder: str | Path) -> set[str]:
    """SHA-256 of the images whose last line in ``decisions.csv`` takes an answer back."""
    path = Path(folder) / DECISIONS_FILE
    if not path.is_file():
        return set()
    final = _final(path)
    return set(final.sha256[final.decision == "review"])


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
