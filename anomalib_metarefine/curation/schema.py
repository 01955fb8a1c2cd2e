"""What a manifest must look like: its columns, and what ``run.json`` says about the run."""

from __future__ import annotations

import re
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from anomalib_metarefine.images.sources import listing
from anomalib_metarefine.images.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable

SCHEMA = "metarefine-manifest/1"
DECISIONS = ("keep", "reject", "review")
DECIDED_BY = ("rule", "user", "unreadable")

_TEXT = ("image_path", "sha256", "decision", "decided_by", "reason", "quality")
_FIRST = ["image_path", "sha256", "decision", "decided_by", "round", "reason"]
_FIRST += ["score", "fence_distance", "q_value", "variant"]
_ROUND = re.compile(r"score_round_(\d+)")
_RUN_TYPES = {"root": str, "seed": int, "rounds": list, "settings": dict, "versions": dict, "data": dict, "files": dict}
_RUN_TYPES |= {"structure": dict, "answers": int, "review": dict}


def require_inside(names: Iterable[str], what: str) -> None:
    """Raise a ``ValueError`` unless every name is a plain path below the root: nothing that leads out, no ``./a``."""
    wrong = [
        name
        for name in names
        if str(PurePosixPath(name)) != name
        or name == "."
        or ".." in (*PurePath(name).parts, *PurePosixPath(name).parts)
        or PurePath(name).anchor
        or PurePosixPath(name).is_absolute()
    ]
    if wrong:
        msg = f"{what} must be relative to the root, inside of it and without `./`; found {listing(wrong)}."
        raise ValueError(msg)


def check_run(run: dict[str, Any]) -> None:
    """Raise a ``ValueError`` that names what is wrong with the content of a ``run.json``."""
    if not isinstance(run, dict):
        msg = f"run must be a JSON object, found {type(run).__name__}."
        raise ValueError(msg)
    schema = run.get("schema", SCHEMA)
    if schema != SCHEMA:
        msg = f"The manifest has schema {schema!r}, but {SCHEMA!r} is expected. Install the version that wrote it."
        raise ValueError(msg)
    for name, kind in _RUN_TYPES.items():
        if name in run and not isinstance(run[name], kind):
            msg = f"run[{name!r}] must be of type {kind.__name__}, found {run[name]!r}."
            raise ValueError(msg)
    if not (is_remote(run.get("root", "")) or Path(run.get("root", "")).is_absolute()):
        msg = f"run['root'] must be the absolute folder of the images, found {run.get('root')!r}."
        raise ValueError(msg)
    for number, entry in enumerate(run.get("rounds", []), 1):
        numbers = [entry.get("number"), entry.get("fence") or 0] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, int | float) for value in numbers):
            msg = f"run['rounds'] must have number and fence in every entry, found {entry!r} as entry {number}."
            raise ValueError(msg)


def checked_table(table: pd.DataFrame) -> pd.DataFrame:
    """A copy with the columns in order and of the right types."""
    missing = [column for column in [*_FIRST, "quality"] if column not in table]
    if missing:
        msg = f"a manifest needs the columns {missing}; found {list(table.columns)}."
        raise ValueError(msg)
    rounds = sorted((c for c in table if _ROUND.fullmatch(c)), key=lambda c: int(_ROUND.fullmatch(c)[1]))
    parts = [c for c in table if c.startswith("score_") and c not in rounds]
    ordered = [*_FIRST, *(["likeness"] if "likeness" in table else []), *parts, *rounds, "quality"]
    table = table[[*ordered, *(c for c in table if c not in ordered)]].copy()
    if table.empty:
        msg = "it lists no image."
        raise ValueError(msg)
    for column in ordered:
        table[column] = _typed(table[column])
    table["sha256"] = table.sha256.str.lower()
    for column, allowed in [("decision", DECISIONS), ("decided_by", DECIDED_BY)]:
        strange = sorted(set(table[column]) - set(allowed))
        if strange:
            msg = f"{column} must be one of {list(allowed)}; found {listing(strange)}."
            raise ValueError(msg)
    repeated = table.image_path[table.image_path.duplicated()].tolist()
    if repeated:
        msg = f"{len(repeated)} images are listed more than once: {listing(repeated)}."
        raise ValueError(msg)
    # Paths are joined to folders that `apply` writes into: none may lead out of them.
    require_inside(table.image_path, "image_path")
    if not table.q_value.dropna().between(0, 1).all():
        msg = "q_value must lie in [0, 1]; "
        raise ValueError(msg + f"found {table.q_value.min():g} to {table.q_value.max():g}.")
    return table.sort_values("image_path", ignore_index=True)


def _typed(column: pd.Series) -> pd.Series:
    if column.name in _TEXT:
        return column.fillna("").astype(str)
    try:
        if pd.api.types.is_numeric_dtype(column):
            numbers = column.astype(float)
        else:  # text of a file: Python's float, unlike pandas' fast parser, gives back the very number written
            numbers = pd.Series([float(value) if value not in ("", None) else np.nan for value in column], column.index)
    except (TypeError, ValueError) as error:
        msg = f"{column.name} must be a number ({error})."
        raise ValueError(msg) from error
    if column.name != "round":
        return numbers
    if not (numbers % 1 == 0).all():
        msg = f"round must be a whole number, found {listing(numbers[numbers % 1 != 0].tolist())}."
        raise ValueError(msg)
    return numbers.astype(int)
