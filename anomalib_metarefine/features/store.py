"""The feature store: embeddings of the training images, in memory up to a limit, in a memory-mapped file past it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_GROWTH = 2  # the file doubles when it is full: amortised constant cost per image


class FeatureStore:
    """Half-precision patch embeddings of one pass over the training images, with the path of each image.

    Args:
        memory_limit_mb (float): Past this many megabytes of embeddings the store moves to a memory-mapped file in a
            temporary folder, which goes when the store does.

    Example:
        >>> store = FeatureStore()
        >>> store.add(["a.png", "b.png"], torch.zeros(2, 16, 152))
        >>> len(store), store.shape, store.on_disk
        (2, (16, 152), False)
    """

    def __init__(self, memory_limit_mb: float = 2048) -> None:
        self._limit = memory_limit_mb * 2**20
        self._chunks: list[torch.Tensor] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._file: np.memmap | None = None
        self._count = 0
        self._order: np.ndarray | None = None
        self.paths: list[str] = []
        self.left_out: dict[str, str] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def shape(self) -> tuple[int, int]:
        """Patches and channels of one image."""
        if self._file is not None:
            return tuple(self._file.shape[1:])
        return tuple(self._chunks[0].shape[1:])

    @property
    def on_disk(self) -> bool:
        """Whether the memory limit was passed."""
        return self._file is not None

    def add(self, paths: Sequence[str], embeddings: torch.Tensor) -> None:
        """Append a batch.

        Images whose embeddings are not finite in half precision (a broken image, an overflowing backbone) are left
        out and named, with the reason, in `left_out`.

        Args:
            paths (Sequence[str]): One path an image.
            embeddings (torch.Tensor): ``[B x P x C]``, on any device.

        Raises:
            ValueError: If patches or channels differ from those of the images already stored.
            RuntimeError: If the store was sorted.
        """
        if self._order is not None:
            msg = "The store is sorted; images can't be added any more."
            raise RuntimeError(msg)
        half = embeddings.detach().to("cpu", torch.float16)
        finite = half.isfinite().flatten(1).all(1)
        for i in (~finite).nonzero().flatten().tolist():
            self.left_out[paths[i]] = (
                "its features are not finite (NaN or infinite pixels, or a backbone that overflows)"
            )
        half, kept = half[finite], [path for path, ok in zip(paths, finite.tolist(), strict=True) if ok]
        if not kept:
            return
        if self._count and tuple(half.shape[1:]) != self.shape:
            msg = (
                f"Images of different sizes reached the feature store: {tuple(half.shape[1:])} patches x channels "
                f"after {self.shape}. Resize in the pre-processor (`image_size`), or batch images of one size only."
            )
            raise ValueError(msg)
        if self._file is None and (self._count + len(half)) * half[0].nbytes > self._limit:
            self._move_to_disk(half)
        if self._file is None:
            self._chunks.append(half)
        else:
            self._reserve(self._count + len(half))
            self._file[self._count : self._count + len(half)] = half.numpy()
        self._count += len(half)
        self.paths.extend(kept)

    def sort(self) -> None:
        """Bring the images in the order of their paths, so that results don't depend on how a dataloader shuffled."""
        order = np.argsort(self.paths, kind="stable")
        self.paths = [self.paths[i] for i in order]
        self._order = order if self._order is None else self._order[order]

    def images(self, rows: Sequence[int] | np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Embeddings of some images in single precision, ``[N x P x C]``."""
        rows = rows if self._order is None else self._order[rows]
        if self._file is not None:
            return torch.from_numpy(np.asarray(self._file[: self._count][rows], dtype=np.float32))
        self._consolidate()
        return self._chunks[0][rows].float()

    def chunks(self, rows: np.ndarray, size: int = 64) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Some images a few at a time: their rows ``[n]`` and embeddings ``[n x P x C]``."""
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part, self.images(part)

    def of(self, paths: Sequence[str]) -> FeatureStore:
        """A store in memory of the images of these paths, in this order; each must be here."""
        row_of = {path: row for row, path in enumerate(self.paths)}
        store = FeatureStore()
        store.add(paths, self.images([row_of[path] for path in paths]))
        return store

    def sample_patches(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """``[count x C]`` patches drawn at random from all images and positions (all of them if there are fewer)."""
        patches = self.shape[0]
        total = len(self) * patches
        picks = torch.randperm(total, generator=generator)[:count].sort().values
        rows, columns = picks // patches, picks % patches
        if self._order is not None:
            rows = torch.from_numpy(self._order)[rows]
        if self._file is not None:
            return torch.from_numpy(self._file[rows.numpy(), columns.numpy()].astype(np.float32))
        self._consolidate()
        return self._chunks[0][rows, columns].float()

    def _consolidate(self) -> None:
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks)]

    def _move_to_disk(self, incoming: torch.Tensor) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="metarefine-", ignore_cleanup_errors=True)
        held, self._chunks = self._chunks, []
        self._allocate(max(_GROWTH * self._count, len(incoming)), tuple(incoming.shape[1:]))
        position = 0
        for chunk in held:
            self._file[position : position + len(chunk)] = chunk.numpy()
            position += len(chunk)

    def _reserve(self, count: int) -> None:
        if count <= len(self._file):
            return
        full = self._file
        self._allocate(max(_GROWTH * len(full), count), full.shape[1:])
        self._file[: len(full)] = full

    def _allocate(self, count: int, shape: tuple[int, ...]) -> None:
        path = Path(self._folder.name) / f"embeddings-{count}.f16"
        self._file = np.memmap(path, dtype=np.float16, mode="w+", shape=(count, *shape))
