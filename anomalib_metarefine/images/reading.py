"""Read every image file once: which can't be decoded, and what is in the others."""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # of image files, in any case


class CheckedImages(NamedTuple):
    """What reading image files gave.

    Attributes:
        hashes (dict[str, str]): SHA-256 of the content of each readable file, by path.
        unreadable (dict[str, str]): Reason, by path, for each file that is empty, truncated or no image at all.
    """

    hashes: dict[str, str]
    unreadable: dict[str, str]


def check_images(paths: Sequence[str | Path]) -> CheckedImages:
    """Decode every image once, before a training run trips over one."""
    checked = CheckedImages({}, {})
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for path, (digest, reason) in zip(map(str, paths), pool.map(_check, paths), strict=True):
            if reason is None:
                checked.hashes[path] = digest
            else:
                checked.unreadable[path] = reason
    return checked


def _check(path: str | Path) -> tuple[str, str | None]:
    try:
        content = Path(path).read_bytes()
        if not content:
            return "", "the file is empty"
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"
    return hashlib.sha256(content).hexdigest(), None
