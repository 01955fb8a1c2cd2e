"""8-bit upright RGB copies of images, which every reader reads alike."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from anomalib_metarefine.images.reading import EXTENSIONS, check_bit_depth, read_image, reason_of
from anomalib_metarefine.images.sources import absolute, listing, read_source
from anomalib_metarefine.images.storage import is_inside

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


class Converted(NamedTuple):
    """What came of a conversion."""

    written: list[Path]  # the copies
    unreadable: dict[str, str]  # reason, by name, for each image that has no copy


def convert(
    data: str | Path | Iterable[str | Path],
    to: str | Path,
    bit_depth: int | None = None,
    extensions: Sequence[str] = EXTENSIONS,
) -> Converted:
    """Write every image as an 8-bit PNG, with the pixels that `read_image` gives, under its own name and folder.

    Args:
        data (str | Path | Iterable[str | Path]): See `read_source`.
        to (str | Path): Made if it does not exist; outside of the images' folder. Nothing in it is overwritten.
        bit_depth (int | None): Bits in use of files with more than 8; ``None`` takes those of the file.
        extensions (Sequence[str]): File names to look for in a folder.

    Raises:
        FileExistsError: If a copy would overwrite a file.
        ValueError: If ``to`` lies among the images, or two copies would have one name.
    """
    check_bit_depth(bit_depth)
    source, to = read_source(data, extensions=extensions), absolute(to)
    if is_inside(to, source.root):
        msg = f"{to} lies among the images of {source.root}: its copies would be taken for images. Choose another."
        raise ValueError(msg)
    targets = [(to / name).with_suffix(".png") for name in source.names]
    twice = [str(target) for target, count in Counter(targets).items() if count > 1]
    if twice:
        msg = f"Two images would both be written to {listing(twice)}. Rename one of each pair."
        raise ValueError(msg)
    there = [target for target in targets if target.exists()]
    if there:
        msg = f"{len(there)} files exist already: {listing(there)}. Choose an empty or new folder."
        raise FileExistsError(msg)

    def write(place: int) -> str | None:
        try:
            image = read_image(source.paths[place], bit_depth)
        except (OSError, ValueError) as error:
            return reason_of(error)
        pixels = image.levels if image.levels.dtype == np.uint8 else (255 * image.pixels).round().astype(np.uint8)
        targets[place].parent.mkdir(parents=True, exist_ok=True)
        with targets[place].open("xb") as file:
            Image.fromarray(pixels).save(file, "PNG")
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(write, range(len(targets))))
    return Converted(
        [target for target, reason in zip(targets, reasons, strict=True) if reason is None],
        {name: reason for name, reason in zip(source.names, reasons, strict=True) if reason is not None},
    )
