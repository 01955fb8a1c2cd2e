"""Features of a list of image files: decoded ahead in threads, one pass of the backbone, into a feature store."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from anomalib.data.utils import read_image
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_metarefine.features.backbone import Backbone, normalization
from anomalib_metarefine.features.embedding import patch_embeddings
from anomalib_metarefine.features.store import FeatureStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_AHEAD = 2  # batches decoded ahead of the backbone


@torch.no_grad()
def collect_features(
    paths: Sequence[Path],
    backbone: Backbone,
    name: str,
    image_size: tuple[int, int],
    batch_size: int,
    memory_limit_mb: float,
    on_images: Callable[[int], None],
) -> tuple[FeatureStore, tuple[int, int]]:
    """Read, resize and embed images, as `MetaRefine` does in training.

    Args:
        paths (Sequence[Path]): Image files that can be read.
        backbone (Backbone): Runs on a GPU where there is one.
        name (str): Its timm name, for the normalisation.
        image_size (tuple[int, int]): Height and width.
        batch_size (int): Images at a time.
        memory_limit_mb (float): See `FeatureStore`.
        on_images (Callable[[int], None]): Told how many images were done since it was last called.

    Returns:
        tuple[FeatureStore, tuple[int, int]]: Embeddings, and rows and columns of patches.

    Raises:
        ValueError: If the features of no image are finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbone.to(device)
    mean, std = normalization(name)
    transform = Compose([Resize(image_size, antialias=True), Normalize(mean=list(mean), std=list(std))])
    store, grid = FeatureStore(memory_limit_mb), (0, 0)
    for part, images in _batches(paths, transform, batch_size):
        maps = backbone(images.to(device))
        grid = tuple(maps[-1].shape[-2:])
        store.add([str(path) for path in part], patch_embeddings(maps))
        on_images(len(part))
    if len(store) == 0:
        path, reason = next(iter(store.left_out.items()))
        msg = f"There is no image to learn from. The first is {path}: {reason}."
        raise ValueError(msg)
    return store, grid


def _batches(
    paths: Sequence[Path], transform: Compose, batch_size: int
) -> Iterator[tuple[Sequence[Path], torch.Tensor]]:
    parts = deque(paths[i : i + batch_size] for i in range(0, len(paths), batch_size))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        waiting: deque = deque()
        while parts or waiting:
            while parts and len(waiting) < _AHEAD:
                part = parts.popleft()
                read = [pool.submit(lambda path: transform(read_image(path, as_tensor=True)), path) for path in part]
                waiting.append((part, read))
            part, read = waiting.popleft()
            yield part, torch.stack([image.result() for image in read])
