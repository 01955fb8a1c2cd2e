"""From whatever the user calls data to features in a store: what every command does that learns from images."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anomalib_metarefine import __version__
from anomalib_metarefine.features.extract import collect_features
from anomalib_metarefine.features.resize import suggested_size
from anomalib_metarefine.images.quality import ImageFacts, inspect_images
from anomalib_metarefine.images.sources import EXTENSIONS, Source, read_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from anomalib.data import AnomalibDataModule
    from rich.progress import Progress

    from anomalib_metarefine.features.backbone import Backbone
    from anomalib_metarefine.features.store import FeatureStore


class Gathered(NamedTuple):
    """Images and their features.

    Attributes:
        source (Source): Where the images are, and what they are called.
        facts (list[ImageFacts]): One an image of the source.
        readable (list[int]): Rows of the source that could be decoded.
        image_size (tuple[int, int]): Height and width that they were resized to.
        store (FeatureStore): Their embeddings.
        grid (tuple[int, int]): Rows and columns of patches.
        seconds (dict[str, float]): What reading and features took.
    """

    source: Source
    facts: list[ImageFacts]
    readable: list[int]
    image_size: tuple[int, int]
    store: FeatureStore
    grid: tuple[int, int]
    seconds: dict[str, float]


def gather(
    data: str | Path | AnomalibDataModule | Iterable[str | Path],
    backbone: Backbone,
    name: str,
    bars: Progress,
    *,
    root: str | Path | None = None,
    extensions: Sequence[str] = EXTENSIONS,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 32,
    memory_limit_mb: float = 2048,
) -> Gathered:
    """Read images, look at each, and embed those that can be read.

    Args:
        data (str | Path | AnomalibDataModule | Iterable[str | Path]): See `read_source`.
        backbone (Backbone): Runs on a GPU where there is one.
        name (str): Its timm name.
        bars (Progress): Where bars are shown.
        root (str | Path | None): What paths in a table are relative to.
        extensions (Sequence[str]): File names to look for in a folder.
        image_size (tuple[int, int] | None): Height and width in pixels; ``None`` takes the shape of most images, at the
            area of 256 x 256 pixels.
        batch_size (int): Images at a time in the backbone.
        memory_limit_mb (float): Past it, features go to a memory-mapped temporary file.

    Returns:
        Gathered: Images and features.

    Raises:
        FileNotFoundError: If there are no such data.
        ValueError: If no image can be read.
    """
    source = read_source(data, root, extensions)
    begin = time.perf_counter()
    task = bars.add_task("reading images", total=len(source.paths))
    facts = inspect_images(source.paths, source.names, lambda: bars.advance(task))
    readable = [i for i, fact in enumerate(facts) if fact.unreadable is None]
    if not readable:
        msg = f"None of the {len(facts)} images can be read. The first is {facts[0].path} ({facts[0].unreadable})."
        raise ValueError(msg)
    read = time.perf_counter()
    size = image_size or _usual_size([facts[i] for i in readable])
    task = bars.add_task("features", total=len(readable))
    paths = [source.paths[i] for i in readable]
    store, grid = collect_features(
        paths, backbone, name, size, batch_size, memory_limit_mb, lambda count: bars.advance(task, count)
    )
    seconds = {"reading": read - begin, "features": time.perf_counter() - read}
    return Gathered(source, facts, readable, size, store, grid, seconds)


def versions() -> dict[str, str]:
    """What figures may depend on: Python, this package and those that it computes with."""
    packages = ("anomalib", "torch", "timm", "numpy")
    return {
        "python": platform.python_version(),
        "anomalib-metarefine": __version__,
        **{package: version(package) for package in packages},
    }


def _usual_size(facts: list[ImageFacts]) -> tuple[int, int]:
    """A size of the shape of most images."""
    return suggested_size(float(np.median([fact.height / fact.width for fact in facts])), 1.0)
