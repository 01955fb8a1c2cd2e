"""Find the images that can't be read, before a training run trips over them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence


def unreadable_images(paths: Sequence[str | Path]) -> dict[str, str]:
    """Decode every image once and collect those that fail.

    Args:
        paths (Sequence[str | Path]): Image files.

    Returns:
        dict[str, str]: Path and reason of each image that is empty, truncated or no image at all.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(_why_unreadable, paths))
    return {str(path): reason for path, reason in zip(paths, reasons, strict=True) if reason}


def _why_unreadable(path: str | Path) -> str | None:
    try:
        if Path(path).stat().st_size == 0:
            return "the file is empty"
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
