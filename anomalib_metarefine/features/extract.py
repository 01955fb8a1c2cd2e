"""Features of a list of image files: decoded ahead in threads, one pass of the backbone, into a feature store."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_metarefine.features.backbone import Backbone, normalization
from anomalib_metarefine.features.embedding import patch_embeddings
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.images.reading import ImageFile, read_image
from anomalib_metarefine.images.regions import looked_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy as np

_AHEAD = 2  # batches decoded ahead of the backbone


@torch.no_grad()
def collect_features(
    paths: Sequence[Path],
    backbone: Backbone,
    name: str,
    image_size: tuple[int, int],
    batch_size: int,
    memory_limit_mb: float,
    read: Callable[[Path], ImageFile | None] = read_image,
    ignored: np.ndarray | None = None,
) -> tuple[FeatureStore, tuple[int, int]]:
    """Read, resize and embed images, as `MetaRefine` does in training.

    Args:
        paths (Sequence[Path]): Image files.
        backbone (Backbone): Runs on a GPU where there is one.
        name (str): Its timm name, for the normalisation.
        image_size (tuple[int, int]): Height and width.
        batch_size (int): Images at a time.
        memory_limit_mb (float): See `FeatureStore`.
        read (Callable[[Path], ImageFile | None]): Reads a file, in one of several threads; ``None`` leaves it out.
        ignored (np.ndarray | None): Mask of regions, see `looked_at`; places in them are not stored.

    Returns:
        tuple[FeatureStore, tuple[int, int]]: Embeddings, and rows and columns of patches.

    Raises:
        ValueError: If no image can be read, or the features of none are finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.to(device)
    mean, std = normalization(name)
    transform = Compose([Resize(image_size, antialias=True), Normalize(mean=list(mean), std=list(std))])
    store, grid = FeatureStore(memory_limit_mb), (0, 0)
    for part, images in _batches(paths, lambda path: _resized(read(path), transform), batch_size):
        maps = backbone(images.to(device))
        grid = tuple(maps[-1].shape[-2:])
        embeddings = patch_embeddings(maps)
        if ignored is not None:
            embeddings = embeddings[:, torch.from_numpy(looked_at(ignored, grid)).to(device)]
        store.add([str(path) for path in part], embeddings)
    if len(store) == 0:
        if not store.left_out:
            msg = f"None of the {len(paths)} images can be read."
            raise ValueError(msg)
        path, reason = next(iter(store.left_out.items()))
        msg = f"There is no image to learn from. The first is {path}: {reason}."
        raise ValueError(msg)
    return store, grid


def _batches(
    paths: Sequence[Path], load: Callable[[Path], torch.Tensor | None], batch_size: int
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Batches of the images that can be read; all are full but the last."""
    part: list[tuple[Path, torch.Tensor]] = []
    for path, image in _loaded(paths, load, _AHEAD * batch_size):
        if image is not None:
            part.append((path, image))
        if len(part) == batch_size:
            yield [path for path, _ in part], torch.stack([image for _, image in part])
            part = []
    if part:
        yield [path for path, _ in part], torch.stack([image for _, image in part])


def _loaded(
    paths: Sequence[Path], load: Callable[[Path], torch.Tensor | None], ahead: int
) -> Iterator[tuple[Path, torch.Tensor | None]]:
    """In order, with at most ``ahead`` images loaded before they are asked for."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        waiting: deque = deque()
        try:
            for path in paths:
                waiting.append((path, pool.submit(load, path)))
                if len(waiting) > ahead:
                    first, loading = waiting.popleft()
                    yield first, loading.result()
            for path, loading in waiting:
                yield path, loading.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an error in one image must not wait for the others


def _resized(image: ImageFile | None, transform: Compose) -> torch.Tensor | None:
    return None if image is None else transform(_as_tensor(image))


def image_tensor(path: str | Path, bit_depth: int | None = None) -> torch.Tensor:
    """An image file as a tensor ``[3 x H x W]`` in [0, 1], see `read_image`."""
    return _as_tensor(read_image(path, bit_depth))


def _as_tensor(image: ImageFile) -> torch.Tensor:
    return torch.from_numpy(image.pixels).permute(2, 0, 1)
