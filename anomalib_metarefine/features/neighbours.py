"""Patch nearest neighbours between images: is there another image in which this patch looks like this?

A defect is rare: in most other images there is nothing like it at its place, while normal patterns recur everywhere.
Drawing many small support sets and scoring each image by its distance to the nearest patch of each support (episodic
scoring) measures this; with the distance of every patch to *every single image* at hand, the score against any support
set is a minimum over its images, so no support has to be drawn at all. A patch is compared with the patches of a small
window around its own place: on aligned parts that is where its like is, on others it was measured to be as good as a
search of the whole image, at a tenth of the cost.

References:
    - Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), arXiv 2106.08265.
    - Xie et al., "Pushing the Limits of Few-Shot Anomaly Detection in Industry Vision: GraphCore", arXiv 2301.12082.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from anomalib_metarefine.features.embedding import image_score
from anomalib_metarefine.features.executors import advance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anomalib_metarefine.features.shards import Shard
    from anomalib_metarefine.features.store import FeatureStore

_DIMENSIONS = 64  # principal components; 32 lost 4 points of AUROC on `screw`, more gained nothing
_CHUNK = 32  # images at a time
_FARTHEST = 65_000.0  # what half precision holds
_SAMPLE = 65_536  # patches that the principal components are computed from


class NearestImages:
    """For every patch, the reference images that come nearest to it, and how near.

    The lists stay in the shards of the store. They name references, not images: whoever asks about a set of images
    hands out one bit a reference, and gets a number an image.

    Args:
        store (FeatureStore): Embeddings of all images; results follow its order.
        grid (tuple[int, int]): Rows and columns of patches.
        seed (int): Of which images are references, where there are more than ``references``.
        window (int): Patches at most this far off, in rows and columns, are compared.
        references (int): Images compared with at most; cost and memory grow with them.
        nearest (int): References remembered for each patch. Where all of them are rejected later, the farthest stands
            for the rest, so that a patch never scores better for it.
        on_images (Callable[[int], None]): Told how many images were done since it was last called.
        looked (np.ndarray | None): ``[rows * columns]`` mask of the places that the store has; ``None`` means all.
        rows (np.ndarray | None): ``[N]`` rows of the store of the images to compare; ``None`` compares all.
        axes (tuple[torch.Tensor, torch.Tensor] | None): Mean ``[C]`` of the patches and their principal axes
            ``[C x D]``, the first ones first; ``None`` finds them.

    Attributes:
        store (FeatureStore): As given.
        chosen (np.ndarray): ``[M]`` rows of the references.
        axes (tuple[torch.Tensor, torch.Tensor]): As above, those that were compared along.
    """

    def __init__(
        self,
        store: FeatureStore,
        grid: tuple[int, int],
        seed: int,
        window: int = 1,
        references: int = 300,
        nearest: int = 24,
        on_images: Callable[[int], None] = lambda _images: None,
        looked: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        axes: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.store = store
        self._latest: tuple[bytes, float, np.ndarray] | None = None
        generator = torch.Generator().manual_seed(seed)
        count = len(store)
        self.chosen = torch.randperm(count, generator=generator)[:references].sort().values.numpy()
        if axes is None:
            sample = store.sample_patches(_SAMPLE, generator)
            axes = sample.mean(0), torch.linalg.eigh(torch.cov((sample - sample.mean(0)).T)).eigenvectors.flip(1)
        self.axes = axes[0], axes[1][:, :_DIMENSIONS].clone()
        self._memory = memory = _project(store.images(self.chosen), *self.axes)
        masks = [None if mask is None else mask.tolist() for mask in (looked, rows)]
        key = repr((store.key, count, seed, window, references, nearest, masks))
        self._lists = f"lists-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self._remembers_all = nearest >= len(self.chosen)
        asked = np.ones(count, dtype=bool)
        if rows is not None:
            asked[:] = False
            asked[rows] = True
        number = np.full(count, -1)  # of the reference that an image is
        number[self.chosen] = np.arange(len(self.chosen))
        norms = memory.square().sum(-1)
        against = _References(self._lists, *self.axes, memory, norms, grid, window, nearest, looked)
        store.map(_compare, against, number, asked, on_images=on_images)

    @property
    def distances(self) -> np.ndarray:
        """``[N x P x K]`` half precision, ascending, of all images; infinite where there is no other image."""
        return self.store.read(self._lists)["distance"]

    @property
    def images(self) -> np.ndarray:
        """``[N x P x K]`` rows of the store."""
        return self.chosen[self.store.read(self._lists)["reference"]]

    def episodic(self, kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Distance of every patch to the nearest like it in a random half of the other images of a set.

        A support set takes each image with probability 1/2, so the nearest one is in it with probability 1/2, the
        second decides with 1/4, the third with 1/8: mean and standard deviation over *all* support sets in closed form.

        Args:
            kept (np.ndarray): Mask of the set, over the rows of the store.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Mean and standard deviation, ``[N x P]`` each; zero where there is no
                other image at all. For few images: elsewhere, see `keep_distances`.
        """
        parts = self.store.map(_episodic_of_shard, (self._lists, kept[self.chosen], self._remembers_all))
        mean, deviation = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        return mean, deviation

    def image_distances(self, sets: Sequence[np.ndarray], tail: float) -> np.ndarray:
        """Mean distance of the most distant patches of each image, see `episodic`, ``[S x N]``.

        Args:
            sets (Sequence[np.ndarray]): ``S`` masks ``[N]`` of the images that support sets are drawn from.
            tail (float): Share of the patches that count.
        """
        kept = np.array([one[self.chosen] for one in sets])
        return self.store.per_image(_image_distances, (self._lists, kept, self._remembers_all, tail)).T

    def keep_distances(self, kept: np.ndarray, tail: float) -> np.ndarray:
        """The same of one set, ``[N]``; the shards keep what it comes from as ``distances``, ``[N x P]``."""
        # Structure and first round ask the same, and so do the last round and what follows it.
        asked = kept[self.chosen].tobytes()
        if self._latest is None or self._latest[:2] != (asked, tail):
            shared = self._lists, kept[self.chosen], self._remembers_all, tail
            self._latest = asked, tail, self.store.per_image(_keep_distances, shared)
        return self._latest[2]

    def layouts(self, variants: np.ndarray) -> np.ndarray:
        """Share of the variance of the patches of each variant that their place explains, ``[V]``, in [0, 1].

        From its references; NaN where it has none. Variants are given by their number, ``[N]``.
        """
        own = variants[self.chosen]
        return np.array([_layout(self._memory[:, own == variant]) for variant in range(variants.max() + 1)])

    def nearest_references(self) -> np.ndarray:
        """Share of the patches of each reference whose nearest other is each of them, ``[M x M]``."""
        is_reference = np.zeros(len(self.store), dtype=bool)
        is_reference[self.chosen] = True
        return np.concatenate(self.store.map(_nearest_references, (self._lists, len(self.chosen)), is_reference))

    def share_nearest(self, groups: np.ndarray) -> np.ndarray:
        """Share of the patches of each image whose nearest image is of each group, masks ``[N x G]``: ``[N x G]``."""
        return self.store.per_image(_share_nearest, (self._lists, groups[self.chosen]))


class _References(NamedTuple):
    """What every image is compared with."""

    lists: str  # name of the lists, which may be there from an earlier run
    centre: torch.Tensor  # [C]
    axes: torch.Tensor  # [C x D]
    memory: torch.Tensor  # [P x M x D]
    norms: torch.Tensor  # [P x M]
    grid: tuple[int, int]
    window: int
    nearest: int
    looked: np.ndarray | None


@torch.no_grad()
def _compare(shard: Shard, against: _References, number: np.ndarray, asked: np.ndarray) -> None:
    """Keep the neighbour lists ``[n x P x K]`` of the images asked for."""
    if against.lists in shard:
        advance(len(asked))
        return
    patches, count = against.memory.shape[:2]
    kept, rows = min(against.nearest, count), np.flatnonzero(asked)
    integer = np.uint16 if count < 2**16 else np.int32
    lists = np.empty((len(rows), patches, kept), dtype=[("distance", np.float16), ("reference", integer)])
    embeddings = shard.read("embeddings")
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        chunk = _project(torch.from_numpy(embeddings[part]).float(), against.centre, against.axes)
        squared = _squared(chunk, against)
        own = torch.from_numpy(number[part, None] == np.arange(count))
        squared.masked_fill_(own.unsqueeze(0), float("inf"))
        values, columns = squared.topk(kept, dim=2, largest=False)
        # Infinity means that there is no such image, so no distance may become infinite by being rounded.
        values = torch.where(values.isinf(), values, values.sqrt().clamp_max(_FARTHEST))
        found = lists[start : start + _CHUNK]
        found["distance"], found["reference"] = values.half().transpose(0, 1), columns.transpose(0, 1)
        advance(len(part))
    shard.write(True, **{against.lists: lists})


def _project(embeddings: torch.Tensor, centre: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """Principal components, position first: ``[N x P x C]`` to ``[P x N x D]``."""
    return ((embeddings - centre) @ axes).transpose(0, 1).contiguous()


def _squared(patches: torch.Tensor, against: _References) -> torch.Tensor:
    """Squared distance to the nearest patch of each reference within the window, ``[P x n x M]``."""
    (rows, columns), memory, norms = against.grid, against.memory, against.norms
    places = torch.arange(rows * columns).view(rows, columns)
    looked = torch.ones(rows * columns, dtype=torch.bool) if against.looked is None else torch.tensor(against.looked)
    patch_at = looked.cumsum(0) - 1
    best = torch.full((len(patches), patches.shape[1], memory.shape[1]), float("inf"))
    farthest_down, farthest_right = min(against.window, rows - 1), min(against.window, columns - 1)
    for down in range(-farthest_down, farthest_down + 1):
        for right in range(-farthest_right, farthest_right + 1):
            here = places[max(0, -down) : rows - max(0, down), max(0, -right) : columns - max(0, right)].flatten()
            there = here + down * columns + right
            both = looked[here] & looked[there]
            here, there = patch_at[here[both]], patch_at[there[both]]
            inner = torch.baddbmm(norms[there].unsqueeze(1), patches[here], memory[there].mT, alpha=-2)
            best[here] = torch.minimum(best[here], inner)
    return (best + patches.square().sum(-1, keepdim=True)).clamp_min_(0)


def _episodic_of_shard(shard: Shard, shared: tuple[str, np.ndarray, bool]) -> tuple[np.ndarray, np.ndarray]:
    name, kept, all_of_them = shared
    lists = shard.read(name)
    mean, deviation = _means(lists, kept, all_of_them), np.empty(lists.shape[:2], np.float32)
    for part, weights, distances in _supports(lists, kept, all_of_them):
        deviation[part] = np.sqrt((weights * np.square(distances - mean[part, :, None])).sum(-1))
    return mean, deviation


def _image_distances(shard: Shard, shared: tuple[str, np.ndarray, bool, float]) -> np.ndarray:
    """``[n x S]``."""
    name, sets, all_of_them, tail = shared
    lists = shard.read(name)
    return np.stack([_tails(_means(lists, kept, all_of_them), tail) for kept in sets], 1)


def _keep_distances(shard: Shard, shared: tuple[str, np.ndarray, bool, float]) -> np.ndarray:
    name, kept, all_of_them, tail = shared
    mean = _means(shard.read(name), kept, all_of_them)
    shard.write(distances=mean)
    return _tails(mean, tail)


def _tails(distances: np.ndarray, tail: float) -> np.ndarray:
    return image_score(torch.from_numpy(distances), tail).double().numpy()


def _share_nearest(shard: Shard, shared: tuple[str, np.ndarray]) -> np.ndarray:
    name, groups = shared
    return groups[shard.read(name)["reference"][:, :, 0]].mean(1)


def _nearest_references(shard: Shard, shared: tuple[str, int], asked: np.ndarray) -> np.ndarray:
    name, count = shared
    nearest = shard.read(name)["reference"][asked, :, 0]
    shares = np.empty((len(nearest), count))
    for share, images in zip(shares, nearest, strict=True):
        share[:] = np.bincount(images, minlength=count) / len(images)
    return shares


def _means(lists: np.ndarray, kept: np.ndarray, all_of_them: bool) -> np.ndarray:
    """Mean distances ``[n x P]``, see `NearestImages.episodic`; arguments as for `_supports`."""
    mean = np.empty(lists.shape[:2], np.float32)
    for part, weights, distances in _supports(lists, kept, all_of_them):
        mean[part] = (weights * distances).sum(-1)
    return mean


def _supports(lists: np.ndarray, kept: np.ndarray, all_of_them: bool) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """A few images at a time: which they are, and how probably each reference is the nearest of a support set.

    Args:
        lists (np.ndarray): ``[n x P x K]`` neighbour lists.
        kept (np.ndarray): Mask of references.
        all_of_them (bool): Whether the lists have all references.

    Yields:
        tuple[slice, np.ndarray, np.ndarray]: Images, probabilities and distances ``[i x P x K]``.
    """
    for start in range(0, len(lists), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances = lists["distance"][part].astype(np.float32)
        exists = np.isfinite(distances)
        distances[~exists] = 0
        usable = exists & kept[lists["reference"][part]]
        weights = np.where(usable, 0.5 ** usable.cumsum(-1), 0.0).astype(np.float32)
        total = weights.sum(-1, keepdims=True)
        if all_of_them:  # an empty support set is none
            weights /= np.where(total > 0, total, 1)
            total = (total > 0).astype(np.float32)
        # What is left of the probability goes to the farthest one remembered: it stands for all beyond.
        farthest = np.maximum(exists.sum(-1) - 1, 0)[..., None]
        np.put_along_axis(weights, farthest, np.take_along_axis(weights, farthest, -1) + 1 - total, -1)
        yield part, weights, distances


def _layout(memory: torch.Tensor) -> float:
    """Share of the variance of patches ``[P x M x D]`` that their place explains."""
    if memory.shape[1] == 0:
        return float("nan")
    total = (memory - memory.mean((0, 1))).square().sum()
    own = (memory - memory.mean(1, keepdim=True)).square().sum()
    return float(1 - own / total) if total > 0 else 1.0
