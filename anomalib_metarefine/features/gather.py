"""From whatever the user calls data to features in a store: what every command does that learns from images."""

from __future__ import annotations

import logging
import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from anomalib_metarefine import __version__
from anomalib_metarefine.features.backbone import Backbone, fitting_size
from anomalib_metarefine.features.extract import Recipe, collect_features
from anomalib_metarefine.features.resize import usual_size
from anomalib_metarefine.images.quality import MOST_COMPARED, Descriptor, ImageFacts, judge
from anomalib_metarefine.images.reading import check_bit_depth
from anomalib_metarefine.images.regions import looked_at, read_regions
from anomalib_metarefine.images.sources import EXTENSIONS, Source, read_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy as np
    from anomalib.data import AnomalibDataModule
    from rich.progress import Progress

    from anomalib_metarefine.features.executors import Executor
    from anomalib_metarefine.features.store import FeatureStore


logger = logging.getLogger(__name__)


class Gathered(NamedTuple):
    """Images and their features."""

    source: Source  # where the images are, and what they are called
    facts: list[ImageFacts]  # one an image of the source
    readable: list[int]  # rows of the source that could be decoded
    image_size: tuple[int, int]  # height and width that they were resized to
    store: FeatureStore
    grid: tuple[int, int]  # rows and columns of patches
    looked: np.ndarray | None  # [rows * columns] mask of the places that are stored; None means all
    seconds: dict[str, float]  # of features, and of looking for duplicates and bad pictures


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
    bit_depth: int | None = None,
    ignore: str | Path | None = None,
    executor: Executor | None = None,
    work: Path | None = None,
) -> Gathered:
    """Look at images and embed those that can be read; each file is read and decoded once.

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
        bit_depth (int | None): Bits in use of files with more than 8; ``None`` takes those of the file.
        ignore (str | Path | None): File of regions to ignore, see `read_regions`.
        executor (Executor | None): See `collect_features`.
        work (Path | None): See `collect_features`.

    Returns:
        Gathered: Images and features.

    Raises:
        FileNotFoundError: If there are no such data.
        ValueError: If no image can be read, or none shows anything.
    """
    check_bit_depth(bit_depth)
    ignored = None if ignore is None else read_regions(ignore)
    source = read_source(data, root, extensions)
    begin = time.perf_counter()
    size = fitting_size(name, image_size or usual_size(source.paths))
    task = bars.add_task("features", total=len(source.paths))
    recipe = Recipe(backbone, name, size, batch_size, bit_depth, ignored)
    store, grid, described = collect_features(
        source.paths, recipe, memory_limit_mb, executor, work, lambda images: bars.advance(task, images)
    )
    embedded = time.perf_counter()
    facts = judge(source.paths, source.names, [described[str(path)] for path in source.paths])
    if len(facts) > MOST_COMPARED:
        logger.warning("Near copies are not looked for among %d images: %d at most.", len(facts), MOST_COMPARED)
    readable = [i for i, fact in enumerate(facts) if fact.unreadable is None]
    _check_contents([facts[i] for i in readable])
    _warn_of_other_readers(described)
    seconds = {"features": embedded - begin, "quality": time.perf_counter() - embedded}
    looked = None if ignored is None else looked_at(ignored, grid)
    return Gathered(source, facts, readable, size, store, grid, looked, seconds)


def versions() -> dict[str, str]:
    """What figures may depend on: Python, this package and those that it computes with."""
    packages = ("anomalib", "torch", "timm", "numpy")
    return {
        "python": platform.python_version(),
        "anomalib-metarefine": __version__,
        **{package: version(package) for package in packages},
    }


def _warn_of_other_readers(described: dict[str, Descriptor]) -> None:
    misread = {path: image.misread for path, image in described.items() if image.misread}
    if misread:
        path, reason = min(misread.items())
        logger.warning(
            "anomalib's datamodules would misread %d of the images: %s %s. They are read right here; to train on them, "
            "make copies: metarefine convert DATA --to DIR.", len(misread), path, reason,
        )  # fmt: skip


def _check_contents(facts: list[ImageFacts]) -> None:
    """Refuse a folder without pictures, and say aloud what changes the scores of all."""
    if all("blank" in fact.findings for fact in facts):
        msg = f"All {len(facts)} images are blank: each is of a single colour. The first is {facts[0].path}. "
        raise ValueError(msg + "Check the camera's lens cap and light, and the bit depth (--bit-depth).")
    shallow = [finding for fact in facts for finding in fact.findings if finding.startswith("uses ")]
    if shallow:
        logger.warning(
            "%d images are darker than they need be: each %s. Pass that depth (--bit-depth).", len(shallow), shallow[0]
        )
