"""Which patches of the kept images are learned from: all but the unusual regions, where leaving those out is right.

A dirty image that no rule rejects is still unusual somewhere: on KolektorSDD with 10 % dirty images, leaving such
regions out after the rounds is worth 4 points of image AUROC. Each variant has its own usual, and a small one none. Not
so where images would change their order without the unusual regions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.refinement.fitting import gaussian_scores
from anomalib_metarefine.refinement.patches import (
    LEAST_REGION,
    Places,
    crowded,
    is_usual,
    keeps_order,
    regions,
    scale_rows,
    usual_limit,
)

if TYPE_CHECKING:
    from anomalib_metarefine.features.shards import Shard
    from anomalib_metarefine.features.store import FeatureStore
    from anomalib_metarefine.refinement.fitting import Images
    from anomalib_metarefine.refinement.structure import Structure
    from anomalib_metarefine.settings import Settings


def choose_patches(images: Images, structure: Structure, kept: np.ndarray, settings: Settings, compared: bool) -> None:
    """Keep masks ``[n x P]`` in shards: ``learned``, of patches to learn from, and ``usual``, of those that look it.

    Args:
        images (Images): All images; if they were compared, their shards have ``distances`` to the kept ones.
        structure (Structure): What kind of folder it is.
        kept (np.ndarray): ``[N]`` mask.
        settings (Settings): See `MetaRefine`.
        compared (bool): Whether images were compared.
    """
    images.store.map(_all, len(images.positions), kept)
    if not compared or settings.patch_fence == 0 or not structure.comparable:
        return
    for variant in np.unique(structure.variants):
        own = structure.judged & (structure.variants == variant)
        _leave_out(images, own, own & kept, settings)


def _leave_out(images: Images, own: np.ndarray, kept: np.ndarray, settings: Settings) -> None:
    """Take the unusual patches of a variant, and what lies around them, out of the masks."""
    store, rows = images.store, np.flatnonzero(kept)
    if len(rows) == 0:
        return
    limit = usual_limit(store.read("distances", scale_rows(rows)), settings.patch_fence)
    if not sum(store.map(_look, limit, kept)):
        return
    wide = crowded_places(store, "looks_usual", images.places, LEAST_REGION, own)
    store.map(_go_round, (images.places, wide), own)
    before, after = (gaussian_scores(images, kept, mask, settings) for mask in (None, "outside"))
    if keeps_order(before, after):
        store.map(_take)


def crowded_places(store: FeatureStore, name: str, places: Places, least: int, own: np.ndarray) -> np.ndarray:
    """Mask of the places where regions of a mask in shards are not widened, see `regions`, among own images ``[N]``."""
    (wide,) = store.total(_wide, (name, places, least), own, only=own)
    return crowded(wide.numpy(), int(own.sum()))


def _all(shard: Shard, patches: int, own: np.ndarray) -> None:
    everything = np.ones((len(own), patches), dtype=bool)
    shard.write(learned=everything, usual=everything)


def _look(shard: Shard, limit: np.ndarray, kept: np.ndarray) -> int:
    """The number of unusual patches in kept images."""
    usual = is_usual(shard.read("distances"), limit) | ~kept[:, None]
    shard.write(looks_usual=usual)
    return int((~usual).sum())


def _wide(shard: Shard, shared: tuple[str, Places, int], own: np.ndarray) -> tuple[np.ndarray]:
    name, places, least = shared
    return (regions(places.on_grid(shard.read(name)[own], True), least)[1].sum(0),)


def _go_round(shard: Shard, shared: tuple[Places, np.ndarray], own: np.ndarray) -> None:
    usual = shard.read("looks_usual")
    outside = np.ones_like(usual)
    if own.any():
        outside[own] = shared[0].outside_regions(usual[own], LEAST_REGION, shared[1])
    shard.write(outside=outside)


def _take(shard: Shard, _shared: None) -> None:
    arrays = {name: shard.read(name) for name in ("learned", "usual", "outside", "looks_usual")}
    shard.write(learned=arrays["learned"] & arrays["outside"], usual=arrays["usual"] & arrays["looks_usual"])
