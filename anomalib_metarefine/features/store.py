"""The feature store: embeddings of images in shards, in memory or in files, and passes over them.

A shard is some hundred images one after the other, with all that is known of their patches. Whatever takes ``[N x P]``
numbers stays in shards; a pass gets a shard with its part of some vectors ``[N]``, and gives back a number an image, or
sums. Sums are added in the order of the shards and in double precision: who computed what makes no difference.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anomalib_metarefine.features.executors import InProcess
from anomalib_metarefine.features.shards import RUN, Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anomalib_metarefine.features.executors import Executor, OnImages

SHARD = 512  # images; the results depend on it in their last digits, so it is no setting
_SUMS = 64  # parts that sums come in, at most: those of the Gaussians take 30 MB each
_DRAWN_EXACTLY = 2**26  # patches that a permutation of all is drawn of; it takes 8 bytes each
_READ = 64  # images at a time


class FeatureStore:
    """Half-precision patch embeddings of images, with the path of each.

    Args:
        memory_limit_mb (float): Past this many megabytes of embeddings shards are files of a temporary folder, which
            goes when the store does.
        executor (Executor): Runs passes; in this process by default.

    Example:
        >>> store = FeatureStore()
        >>> store.add(["a.png", "b.png"], torch.zeros(2, 16, 152))
        >>> len(store), store.shape, store.on_disk
        (2, (16, 152), False)
    """

    def __init__(self, memory_limit_mb: float = 2048, executor: Executor | None = None) -> None:
        self.paths: list[str] = []
        self.left_out: dict[str, str] = {}
        self.key = ""  # of a work folder: what its embeddings were made of
        self._limit = memory_limit_mb * 2**20
        self._executor = executor or InProcess()
        self._shards: list[Shard] = []
        self._counts: list[int] = []
        self._waiting: list[torch.Tensor] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._shape: tuple[int, int] = (0, 0)
        self._sorted = False

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int]:
        """Patches and channels of one image."""
        return self._shape

    @property
    def on_disk(self) -> bool:
        """Whether any shard is a file."""
        return any(shard.folder is not None for shard in self.shards)

    @property
    def shards(self) -> list[Shard]:
        """All images, shard by shard."""
        if self._waiting:
            self._cut(1)
        return self._shards

    @property
    def fresh(self) -> FeatureStore:
        """The same images as nothing has looked at them yet: what one run finds must not lie in another's way."""
        store, run = FeatureStore(self._limit / 2**20, self._executor), f"{RUN}{uuid.uuid4().hex}"
        for shard, count in zip(self.shards, self._counts, strict=True):
            first = len(store)
            store.append(shard.fresh(run), self.paths[first : first + count], self._shape)
        store.left_out, store.key, store._sorted = self.left_out, self.key, self._sorted
        store._folder = self._folder  # it lives as long as either does
        weakref.finalize(store, lambda shards: [shard.forget() for shard in shards], store._shards)
        return store

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
        if self._sorted:
            msg = "The store is sorted; images can't be added any more."
            raise RuntimeError(msg)
        half, finite = finite_half(embeddings)
        self.left_out |= {path: NOT_FINITE for path, ok in zip(paths, finite, strict=True) if not ok}
        kept = [path for path, ok in zip(paths, finite, strict=True) if ok]
        if not kept:
            return
        self._check(tuple(half.shape[1:]))
        self.paths.extend(kept)
        self._waiting.append(half)
        self._cut(SHARD)

    def append(self, shard: Shard, paths: Sequence[str], shape: tuple[int, int]) -> None:
        """Append the embeddings of a shard, with one path an image; ``shape`` is patches and channels."""
        self._check(shape)
        self.paths.extend(paths)
        self._shards.append(shard)
        self._counts.append(len(paths))

    def temporary(self) -> Path:
        """A folder that goes when the store does."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="metarefine-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    def new_shard(self, more: int = SHARD) -> Shard:
        """An empty shard: in memory, or in files if the store would get too large with so many images more."""
        size = 2 * self._shape[0] * self._shape[1]
        if (sum(self._counts) + more) * size < self._limit:
            return Shard()
        return Shard(Path(tempfile.mkdtemp(dir=self.temporary())))

    def sort(self) -> None:
        """Bring the images in the order of their paths, so that results don't depend on how a dataloader shuffled."""
        order, self._sorted = np.argsort(self.paths, kind="stable"), True
        if (order == np.arange(len(order))).all():
            return
        before, paths = self.fresh, [self.paths[i] for i in order]
        self._shards, self._counts = [], []
        for start in range(0, len(order), SHARD):
            self._fill(before.read("embeddings", order[start : start + SHARD]))
        for shard in before.shards:
            if shard.folder is not None:
                shutil.rmtree(shard.folder)
        self.paths = paths

    def images(self, rows: Sequence[int] | np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Embeddings of some images in single precision, ``[N x P x C]``."""
        return torch.from_numpy(self.read("embeddings", np.arange(len(self))[rows])).float()

    def chunks(self, rows: np.ndarray, size: int = _READ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
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
        if total <= _DRAWN_EXACTLY:
            picks = torch.randperm(total, generator=generator)[:count].sort().values.numpy()
        else:
            picks = torch.randint(total, (count,), generator=generator).sort().values.numpy()
        rows, columns = picks // patches, picks % patches
        parts = []
        for shard, first, last in self._ranges():
            own = slice(*np.searchsorted(rows, (first, last)))
            if own.start < own.stop:
                images, place = np.unique(rows[own] - first, return_inverse=True)
                parts.append(shard.read("embeddings", images)[place, columns[own]])
        return torch.from_numpy(np.concatenate(parts)).float()

    def read(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """What passes have kept under a name, of some images or of all (few enough for memory), ``[n x ...]``."""
        if rows is None:
            return np.concatenate([shard.read(name) for shard in self.shards])
        found, places = [], []
        for shard, first, last in self._ranges():
            own = np.flatnonzero((rows >= first) & (rows < last))
            if len(own) or not found:
                found.append(shard.read(name, rows[own] - first))
                places.append(own)
        return np.concatenate(found)[np.argsort(np.concatenate(places))]

    def keep(self, **arrays: np.ndarray) -> None:
        """Keep arrays ``[N x ...]`` for passes, under their names."""
        for shard, first, last in self._ranges():
            shard.write(**{name: array[first:last] for name, array in arrays.items()})

    def map(
        self,
        function: Callable[..., Any],
        shared: object = None,
        *vectors: np.ndarray,
        only: np.ndarray | None = None,
        on_images: OnImages = lambda _images: None,
    ) -> list[Any]:
        """Run a pass on every shard.

        Args:
            function (Callable[..., Any]): ``function(shard, shared, *parts)``, of the vectors' parts ``[n]``; must
                be importable, and not change what it gets but by `Shard.write`.
            shared (object): What all shards get.
            *vectors (np.ndarray): ``[N]`` each.
            only (np.ndarray | None): ``[N]`` mask: shards without any of these images are left out.
            on_images (OnImages): See `Executor.map`.

        Returns:
            list[Any]: In the order of the shards.
        """
        return list(self._executor.map(function, self._calls(vectors, only), shared, on_images))

    def total(
        self,
        function: Callable[..., Any],
        shared: object = None,
        *vectors: np.ndarray,
        only: np.ndarray | None = None,
    ) -> list[torch.Tensor]:
        """Sums over the shards of the arrays that a pass gives back, in double precision; arguments as for `map`."""
        calls = self._calls(vectors, only)
        size = -(-len(calls) // _SUMS)
        blocks = [(calls[i : i + size],) for i in range(0, len(calls), size)]
        return _added(self._executor.map(_add, blocks, (function, shared), lambda _images: None))

    def per_image(self, function: Callable[..., Any], shared: object = None, *vectors: np.ndarray) -> np.ndarray:
        """What a pass gives back of each image, ``[N x ...]``; arguments as for `map`."""
        return np.concatenate(self.map(function, shared, *vectors))

    def _calls(self, vectors: Sequence[np.ndarray], only: np.ndarray | None) -> list[tuple[Any, ...]]:
        asked = [(shard, a, b) for shard, a, b in self._ranges() if only is None or only[a:b].any()]
        return [(shard, *(vector[a:b] for vector in vectors)) for shard, a, b in asked]

    def _ranges(self) -> list[tuple[Shard, int, int]]:
        """Each shard with its first row and the row after its last."""
        shards, lasts = self.shards, np.cumsum(self._counts, dtype=int).tolist()
        return list(zip(shards, [0, *lasts], lasts, strict=False))

    def _check(self, shape: tuple[int, int]) -> None:
        if self._shape in ((0, 0), shape):
            self._shape = shape
            return
        msg = (
            f"Images of different sizes reached the feature store: {shape} patches x channels after {self._shape}. "
            "Resize in the pre-processor (`image_size`), or batch images of one size only."
        )
        raise ValueError(msg)

    def _cut(self, least: int) -> None:
        """Make shards of what waits, as long as there are so many images."""
        while sum(map(len, self._waiting)) >= least:
            waiting = torch.cat(self._waiting)
            self._waiting = [waiting[SHARD:]] if len(waiting) > SHARD else []
            self._fill(waiting[:SHARD].numpy())

    def _fill(self, embeddings: np.ndarray) -> None:
        shard = self.new_shard(len(embeddings))
        shard.write(embeddings=embeddings)
        self._shards.append(shard)
        self._counts.append(len(embeddings))


NOT_FINITE = "its features are not finite (NaN or infinite pixels, or a backbone that overflows)"


def finite_half(embeddings: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Embeddings ``[B x P x C]`` in half precision, of the images that are finite in it; and which are, ``[B]``."""
    half = embeddings.detach().to("cpu", torch.float16)
    finite = half.isfinite().flatten(1).all(1)
    return half[finite], finite.tolist()


def _add(calls: list[tuple[Any, ...]], shared: tuple[Callable[..., Any], Any]) -> list[torch.Tensor]:
    function, rest = shared
    return _added(function(shard, rest, *parts) for shard, *parts in calls)


def _added(results: Iterator[Sequence[Any]]) -> list[torch.Tensor]:
    totals: list[torch.Tensor] = []
    for result in results:
        tensors = [torch.as_tensor(part).double() for part in result]
        totals = [a.add_(b) for a, b in zip(totals, tensors, strict=True)] if totals else tensors
    return totals
