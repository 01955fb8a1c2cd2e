"""Fitting a density on the images that are kept: whitening, Gaussians of places, a flow from its initialisation.

Each is a function of its inputs and of a seed of its own. Memory stays bounded: images are whitened chunk by chunk, and
gradient steps draw their patches from a pool of limited size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from anomalib_metarefine.density.flow import bits_per_dimension, position_code
from anomalib_metarefine.density.gaussian import PositionalGaussian
from anomalib_metarefine.density.patch_density import (
    Parameters,
    PatchDensity,
    flow_loss,
    held_out,
    trainable,
)
from anomalib_metarefine.features.embedding import Whitening, image_score
from anomalib_metarefine.meta.episodes import Category, draw_patches
from anomalib_metarefine.meta.maml import get_learner
from anomalib_metarefine.meta.training import meta_train
from anomalib_metarefine.refinement.patches import outside_regions
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import Progress

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.features.store import FeatureStore

_POOL = 384  # images that gradient steps draw from
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
    """

    store: FeatureStore
    whitening: Whitening
    grid: tuple[int, int]
    variants: np.ndarray | None = None
    looked: np.ndarray | None = None

    @property
    def positions(self) -> torch.Tensor:
        """Codes of the places, ``[P x 16]``."""
        codes = position_code(*self.grid)
        return codes if self.looked is None else codes[torch.from_numpy(self.looked)]

    def on_grid(self, values: np.ndarray, ignored: float | bool) -> np.ndarray:
        """Values of patches ``[n x P]`` as maps ``[n x rows x columns]``, with a value for places that are ignored."""
        if self.looked is None:
            return values.reshape(-1, *self.grid)
        maps = np.full((len(values), len(self.looked)), ignored, dtype=values.dtype)
        maps[:, self.looked] = values
        return maps.reshape(-1, *self.grid)

    def outside_regions(self, usual: np.ndarray, least: int) -> np.ndarray:
        """See `patches.outside_regions`, ``[N x P]``; what is ignored is no part of a region."""
        outside = outside_regions(self.on_grid(usual, True).reshape(len(usual), -1), self.grid, least)
        return outside if self.looked is None else outside[:, self.looked]

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

    def chunks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Rows and whitened patches ``[n x P x D]``, a few images at a time; of all images by default."""
        rows = np.arange(len(self.store)) if rows is None else rows
        for part, embeddings in self.store.chunks(rows):
            yield part, self.whitening(embeddings)


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
    learned: np.ndarray,
    flow: PatchFlow,
    initial: Parameters,
    settings: Settings,
    seed: int,
) -> PatchDensity:
    """Gaussians from scratch and the flow from ``initial``: what is left out leaves no trace.

    Args:
        images (Images): All images.
        kept (np.ndarray): ``[N]`` mask of those to learn from.
        learned (np.ndarray): ``[N x P]`` mask of the patches to learn from.
        flow (PatchFlow): The architecture.
        initial (Parameters): The meta-learned initialisation.
        settings (Settings): See `MetaRefine`.
        seed (int): Of the patches drawn.
    """
    groups = images.groups(kept)
    gaussians = tuple(
        fit_gaussian(images, kept & (groups == group), learned, settings.shrinkage) for group in range(groups.max() + 1)
    )
    generator = torch.Generator().manual_seed(seed_for(seed, "adaptation"))
    rows = _pool_rows(kept & (groups >= 0), generator)
    pool, usable = _pool(images, rows, gaussians, groups[rows]), torch.from_numpy(learned[rows]).nonzero()
    batches = (
        draw_patches(pool, images.positions, usable, settings.batch_patches, generator)
        for _ in range(settings.adaptation_steps)
    )
    learner = get_learner(settings.meta_backend)
    parameters = learner.adapt(flow_loss(flow, settings.trim), initial, batches, settings.inner_lr)
    return PatchDensity(images.whitening, gaussians, flow, parameters, settings.tail)


def fit_gaussian(images: Images, kept: np.ndarray, learned: np.ndarray, shrinkage: float) -> PositionalGaussian:
    """Positional whitening of the kept images (``[N]`` mask), of the patches ``[N x P]`` to learn from.

    The pooled covariance weighs ``shrinkage``, and more where images are few: a covariance of few images gives higher
    scores to new ones, and one threshold is to do for variants of 20 and of 200 images.
    """
    chunks = (chunk for _, chunk in images.chunks(np.flatnonzero(kept)))
    mask = torch.from_numpy(learned[kept])
    weight = (_POOLED_IMAGES / (_POOLED_IMAGES + mask.sum(0))).clamp_min(shrinkage)
    return PositionalGaussian.fit(chunks, weight, mask)


@torch.no_grad()
def patch_scores(images: Images, density: PatchDensity, kept: np.ndarray, learned: np.ndarray) -> torch.Tensor:
    """Bits per dimension of all patches, ``[N x P]``; those the density was fitted on as if left out."""
    maps = torch.empty(learned.shape)
    fitted = torch.from_numpy(np.where(learned & kept[:, None], images.groups(kept)[:, None], -1))
    for rows, chunk in images.chunks():
        maps[rows] = density.score(chunk, images.positions, fitted[rows])
    return maps


def image_scores(patches: torch.Tensor, tail: float) -> np.ndarray:
    """See `image_score`, ``[N]``."""
    return image_score(patches, tail).double().numpy()


def gaussian_scores(images: Images, kept: np.ndarray, learned: np.ndarray, settings: Settings) -> np.ndarray:
    """Scores of the kept images by the Gaussians alone, ``[n]``: what the flow adds is far smaller."""
    gaussian = fit_gaussian(images, kept, learned, settings.shrinkage)
    scores = []
    for rows, chunk in images.chunks(np.flatnonzero(kept)):
        z, log_det = held_out(chunk, gaussian, torch.from_numpy(learned[rows]))
        scores.append(image_score(bits_per_dimension(z, log_det), settings.tail))
    return torch.cat(scores).numpy()


def variant_pools(images: Images, settings: Settings, seed: int) -> list[Category]:
    """All images as episodes are drawn from them, variant by variant."""
    everyone = np.ones(len(images.store), dtype=bool)
    learned = np.ones((len(everyone), len(images.positions)), dtype=bool)
    groups, pools = images.groups(everyone), []
    for group in range(groups.max() + 1):
        gaussian = fit_gaussian(images, groups == group, learned, settings.shrinkage)
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
