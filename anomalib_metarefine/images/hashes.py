"""Hashes by which files and data sets are known again, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.images.reading import file_hash

if TYPE_CHECKING:
    from collections.abc import Iterable


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hex; empty if it can't be read."""
    try:
        return file_hash(path)
    except OSError:
        return ""


def data_sha256(image_paths: Iterable[str], hashes: Iterable[str]) -> str:
    """One hash of a whole data set: over the sorted lines ``<image_path> <sha256>``, whatever the order given."""
    lines = sorted(f"{path} {sha256}\n" for path, sha256 in zip(image_paths, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
