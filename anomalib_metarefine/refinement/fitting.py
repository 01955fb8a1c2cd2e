"""Fitting a density on the images that are kept: whitening, Gaussians of places, a flow from its initialisation.

Each is a function of its inputs and of a seed of its own. Memory stays bounded: what goes over all images is a pass
over the shards of a store, and gradient steps draw their patches from a pool of limited size. Which patches are learned
from is said by the name of a mask ``[n x P]`` in every shard; ``None`` means all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from anomalib_metarefine.density.flow import bits_per_dimension, position_code
from anomalib_metarefine.density.gaussian import PlaceSums, PositionalGaussian
from anomalib_metarefine.density.patch_density import (
    Parameters,
    PatchDensity,
    flow_loss,
    held_out,
    trainable,
)
from anomalib_metarefine.density.patch_memory import PatchMemory
from anomalib_metarefine.features.embedding import Whitening, image_score
from anomalib_metarefine.meta.episodes import Category, draw_patches
from anomalib_metarefine.meta.maml import get_learner
from anomalib_metarefine.meta.training import meta_train
from anomalib_metarefine.refinement.patches import Places
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import Progress

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.features.shards import Shard
    from anomalib_metarefine.features.store import FeatureStore

_POOL = 384  # images that gradient steps draw from
_CHUNK = 64  # images at a time
_WHITENING_PATCHES = 65_536  # enough for 150 channels; more change no digit that matters
FEWEST_LEARNED = 5  # kept images of a variant that has Gaussians of its own
_POOLED_IMAGES = 20  # that the pooled covariance counts for: it takes half of the weight among as many


@dataclass(frozen=True)
class Images:
    """Training images as the engine sees them: ``N`` rows of a store, ``P`` patches of ``D`` whitened channels.

    Attributes:
        store (FeatureStore): Embeddings.
        whitening (Whitening): Global whitening.
        grid (tuple[int, int]): Rows and columns of patches.
        variants (np.ndarray | None): ``[N]`` number of each image's variant; ``None`` if there is one.
        looked (np.ndarray | None): ``[rows * columns]`` mask of the places that are not ignored, of which the store
            has the ``P`` patches; ``None`` means all.
        aligned (bool): Whether places say something; if not, the density is a memory of patches.
    """

    store: FeatureStore
    whitening: Whitening
    grid: tuple[int, int]
    variants: np.ndarray | None = None
    looked: np.ndarray | None = None
    aligned: bool = True

    @property
    def positions(self) -> torch.Tensor:
        """Codes of the places, ``[P x 16]``."""
        codes = position_code(*self.grid)
        return codes if self.looked is None else codes[torch.from_numpy(self.looked)]

    @property
    def places(self) -> Places:
        """Where the patches lie."""
        return Places(self.grid, self.looked)

    def groups(self, kept: np.ndarray) -> np.ndarray:
        """Number of the Gaussian that each image counts for, ``[N]``: one for each variant.

        A variant with fewer than five kept images (``[N]`` mask) has none, and its images get -1: too few to learn it
        from, and too different for the Gaussians of others. Where all variants are so small, they are taken as one.
        """
        if self.variants is None:
            return np.zeros(len(self.store), dtype=int)
        large = np.bincount(self.variants[kept], minlength=self.variants.max() + 1) >= FEWEST_LEARNED
        numbers = np.where(large, large.cumsum() - 1, -1) if large.any() else np.zeros(len(large), dtype=int)
        return numbers[self.variants]

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Rows and whitened patches ``[n x P x D]`` of some images, a few at a time."""
        for part, embeddings in self.store.chunks(rows):
            yield part, self.whitening(embeddings)


def whitened(
    shard: Shard, whitening: Whitening, rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows of a shard and their whitened patches ``[n x P x D]``, a few images at a time; of all by default."""
    ready = "whitened" in shard
    patches = shard.read("whitened" if ready else "embeddings")
    rows = np.arange(len(patches)) if rows is None else rows
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        chunk = torch.from_numpy(patches[part]).float()
        yield part, chunk if ready else whitening(chunk)


def fit_whitening(stores: Sequence[FeatureStore], dimensions: int, seed: int) -> Whitening:
    """Global whitening of the patches of one or several stores."""
    generator = torch.Generator().manual_seed(seed_for(seed, "whitening"))
    share = _WHITENING_PATCHES // len(stores)
    return Whitening.fit(torch.cat([store.sample_patches(share, generator) for store in stores]), dimensions)


def learn_initialisation(
    categories: Sequence[Images],
    flow: PatchFlow,
    settings: Settings,
    seed: int,
    progress: Progress,
    log: Callable[[dict[str, float], int], None] = lambda _figures, _step: None,
) -> Parameters:
    """Meta-train the flow on episodes drawn from all images of one or several categories, dirty ones included.

    Returns:
        Parameters: Where every fit begins.
    """
    task = progress.add_task("meta-training", total=settings.meta_steps)

    def on_step(step: int, query_loss: float) -> None:
        progress.update(task, advance=1, description=f"meta-training, query {query_loss:.3f} bits/dim")
        log({"meta/query_bits_per_dim": query_loss}, step)

    generator = torch.Generator().manual_seed(seed_for(seed, "meta-training"))
    pools = [pool for images in categories for pool in variant_pools(images, settings, seed)]
    return meta_train(pools, trainable(flow), flow_loss(flow, settings.trim), settings, generator, on_step)


def fit_density(
    images: Images,
    kept: np.ndarray,
    learned: str | None,
    flow: PatchFlow,
    initial: Parameters,
    settings: Settings,
    seed: int,
) -> PatchDensity:
    """Gaussians from scratch and the flow from ``initial``, or a memory: what is left out leaves no trace.

    Args:
        images (Images): All images.
        kept (np.ndarray): ``[N]`` mask of those to learn from.
        learned (str | None): Name of the mask of the patches to learn from.
        flow (PatchFlow): The architecture.
        initial (Parameters): The meta-learned initialisation.
        settings (Settings): See `MetaRefine`.
        seed (int): Of the patches drawn.
    """
    if not images.aligned:
        memory = fit_memory(images, kept, learned, seed)
        return PatchDensity(images.whitening, (), flow, initial, settings.tail, memory)
    groups = images.groups(kept)
    gaussians = tuple(
        fit_gaussian(images, kept & (groups == group), learned, settings.shrinkage) for group in range(groups.max() + 1)
    )
    generator = torch.Generator().manual_seed(seed_for(seed, "adaptation"))
    rows = _pool_rows(kept & (groups >= 0), generator)
    mask = images.store.read(learned, rows) if learned else np.ones((len(rows), len(images.positions)), dtype=bool)
    pool, usable = _pool(images, rows, gaussians, groups[rows]), torch.from_numpy(mask).nonzero()
    batches = (
        draw_patches(pool, images.positions, usable, settings.batch_patches, generator)
        for _ in range(settings.adaptation_steps)
    )
    learner = get_learner(settings.meta_backend)
    parameters = learner.adapt(flow_loss(flow, settings.trim), initial, batches, settings.inner_lr)
    return PatchDensity(images.whitening, gaussians, flow, parameters, settings.tail)


def fit_memory(images: Images, kept: np.ndarray, learned: str | None, seed: int) -> PatchMemory:
    """Patches of up to 384 of the kept images (``[N]`` mask), of those to learn from."""
    generator = torch.Generator().manual_seed(seed_for(seed, "memory"))
    rows = _pool_rows(kept, generator)
    patches = torch.cat([chunk for _, chunk in images.chunks(rows)])
    numbers = torch.from_numpy(rows)[:, None].expand(patches.shape[:2])
    mask = torch.from_numpy(images.store.read(learned, rows)) if learned else torch.ones(patches.shape[:2]).bool()
    return PatchMemory.fit(patches[mask], numbers[mask], generator)


def fit_gaussian(images: Images, kept: np.ndarray, learned: str | None, shrinkage: float) -> PositionalGaussian:
    """Positional whitening of the kept images (``[N]`` mask), of the patches to learn from.

    The pooled covariance weighs ``shrinkage``, and more where images are few: a covariance of few images gives higher
    scores to new ones, and one threshold is to do for variants of 20 and of 200 images.
    """
    found = images.store.total(_place_sums, (images.whitening, learned), kept, only=kept)
    sums = PlaceSums(*(part.float() for part in found))
    return PositionalGaussian.of(sums, (_POOLED_IMAGES / (_POOLED_IMAGES + sums.count)).clamp_min(shrinkage))


def likelihoods(
    images: Images, density: PatchDensity, kept: np.ndarray, learned: str | None = None, keep: str = ""
) -> np.ndarray:
    """Scores of all images under a density, ``[N]``, see `PatchDensity`, those it was fitted on as if left out.

    Shards keep those of the patches, ``[n x P]``, if ``keep`` gives them a name.
    """
    fitted = np.where(kept, images.groups(kept) if images.aligned else np.arange(len(kept)), -1)
    return images.store.per_image(_likelihoods, (density, images.positions, learned, keep), fitted)


def image_scores(patches: torch.Tensor, tail: float) -> np.ndarray:
    """See `image_score`, ``[N]``."""
    return image_score(patches, tail).double().numpy()


def gaussian_scores(images: Images, kept: np.ndarray, learned: str | None, settings: Settings) -> np.ndarray:
    """Scores of the kept images by the Gaussians alone, ``[n]``: what the flow adds is far smaller."""
    gaussian = fit_gaussian(images, kept, learned, settings.shrinkage)
    shared = gaussian, images.whitening, learned, settings.tail
    return np.concatenate(images.store.map(_gaussian_scores, shared, kept, only=kept))


def variant_pools(images: Images, settings: Settings, seed: int) -> list[Category]:
    """All images as episodes are drawn from them, variant by variant."""
    groups, pools = images.groups(np.ones(len(images.store), dtype=bool)), []
    for group in range(groups.max() + 1):
        gaussian = fit_gaussian(images, groups == group, None, settings.shrinkage)
        rows = _pool_rows(groups == group, torch.Generator().manual_seed(seed_for(seed, "pool")))
        pools.append(Category(_pool(images, rows, [gaussian], np.zeros(len(rows))), images.positions))
    return pools


def _pool_rows(kept: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Up to ``_POOL`` of the kept images, in order."""
    rows = np.flatnonzero(kept)
    if len(rows) <= _POOL:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:_POOL].sort().values.numpy()]


def _pool(
    images: Images, rows: np.ndarray, gaussians: Sequence[PositionalGaussian], groups: np.ndarray
) -> torch.Tensor:
    """Patches ``[n x P x D]`` of some images, whitened by the Gaussians ``[n]`` they count for as if left out."""
    pool = torch.empty(len(rows), *gaussians[0].mean.shape)
    for number, gaussian in enumerate(gaussians):
        for part, chunk in images.chunks(rows[groups == number]):
            pool[np.searchsorted(rows, part)] = gaussian.leave_one_out(gaussian(chunk))[0]  # rows ascend
    return pool


def _mask(shard: Shard, name: str | None, rows: np.ndarray, patches: int) -> np.ndarray:
    """``[n x P]`` mask of the patches to learn from."""
    return shard.read(name, rows) if name else np.ones((len(rows), patches), dtype=bool)


@torch.no_grad()
def _place_sums(shard: Shard, shared: tuple[Whitening, str | None], kept: np.ndarray) -> PlaceSums:
    whitening, learned = shared
    rows = np.flatnonzero(kept)
    mask = torch.from_numpy(shard.read(learned, rows)) if learned else None
    return PlaceSums.of((chunk for _, chunk in whitened(shard, whitening, rows)), mask)


@torch.no_grad()
def _likelihoods(
    shard: Shard, shared: tuple[PatchDensity, torch.Tensor, str | None, str], number: np.ndarray
) -> np.ndarray:
    """Scores ``[n]``; ``number`` is of the Gaussian that each image was fitted on, -1 for none."""
    density, positions, learned, keep = shared
    maps = torch.empty(len(number), len(positions))
    for rows, chunk in whitened(shard, density.whitening):
        fitted = np.where(_mask(shard, learned, rows, len(positions)), number[rows, None], -1)
        maps[rows] = density.score(chunk, positions, torch.from_numpy(fitted))
    if keep:
        shard.write(**{keep: maps.numpy()})
    return image_scores(maps, density.tail)


@torch.no_grad()
def _gaussian_scores(
    shard: Shard, shared: tuple[PositionalGaussian, Whitening, str | None, float], kept: np.ndarray
) -> np.ndarray:
    gaussian, whitening, learned, tail = shared
    scores = []
    for rows, chunk in whitened(shard, whitening, np.flatnonzero(kept)):
        z, log_det = held_out(chunk, gaussian, torch.from_numpy(_mask(shard, learned, rows, chunk.shape[1])))
        scores.append(image_score(bits_per_dimension(z, log_det), tail))
    return torch.cat(scores).numpy()
