"""A person's answers about images, as they lie in a file: which to keep and which to reject.

There is one format. ``decisions.csv`` in an output folder has one line an answer, ``image_path, sha256, decision, when,
by``, and only grows: of several answers about an image the last one counts, the earlier ones are its history. A file
that a person fills in is read the same way; there ``when`` and ``by`` are missing, and answers must not contradict.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from anomalib_metarefine.images.sources import listing
from anomalib_metarefine.images.storage import located
from anomalib_metarefine.images.tables import read_table

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

logger = logging.getLogger(__name__)

DECISIONS_FILE = "decisions.csv"

# What people write, without dots and spaces (i.O. and n.i.O. are German for in and not in order). 0 and 1 as in
# anomalib's labels: 1 is anomalous. "review" takes an earlier answer back, a blank cell is none.
MEANING = {
    **dict.fromkeys(("keep", "good", "ok", "clean", "normal", "io", "pass", "passed", "0", "falsealarm"), "keep"),
    **dict.fromkeys(("reject", "bad", "ng", "nok", "notok", "nio", "fail", "failed", "1"), "reject"),
    **dict.fromkeys(("dirty", "defect", "defective", "anomalous", "missed"), "reject"),
    "review": "review",
}


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
    final = _final(located(path))
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


def load(where: str | Path) -> dict[str, str]:
    """What ``decisions.csv`` holds: keep or reject, by the SHA-256 of the image.

    Args:
        where (str | Path): The file, or the output folder that it lies in.

    Returns:
        dict[str, str]: Empty if nobody decided anything yet.

    Raises:
        ValueError: If the file is damaged, or has answers without ``sha256``.
    """
    path = located(where)
    path = path / DECISIONS_FILE if path.is_dir() else path
    if not path.is_file():
        return {}
    table = read(path)
    nameless = table.image_path[table.sha256 == ""].tolist()
    if nameless:
        msg = f"{path} has {len(nameless)} answers without sha256: {listing(nameless)}. "
        raise ValueError(msg + "Rename it, and pass it to `metarefine curate --decisions`, where the path is enough.")
    return dict(zip(table.sha256, table.decision, strict=True))


def taken_back(folder: str | Path) -> set[str]:
    """SHA-256 of the images whose last line in ``decisions.csv`` takes an answer back."""
    path = located(folder) / DECISIONS_FILE
    if not path.is_file():
        return set()
    final = _final(path)
    return set(final.sha256[final.decision == "review"])
