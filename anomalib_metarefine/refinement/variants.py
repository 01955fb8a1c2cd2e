"""The variants of a folder: those that the user names, the products that it mixes, and minorities of one product.

- *Products*: images of one product find their like among each other and hardly ever elsewhere. The graph of which image
  is nearest to which is cut in two where the fewest patches cross, again and again (normalised cuts).
- *Minorities*: another lot or camera differs from the majority *everywhere*, and its images are alike; a defect differs
  *somewhere*. So, product by product, images are looked for most of whose patches are unusual for their place, and
  whose patches find their nearest like among each other.

The limits were read off the families of `structure`: of the patches of a variant 68 to 83 % find their like among each
other, of defects that cover much of the image 57 % at most. Mixed products agree within themselves to 0.98 and more
(`_agreement`), a product by itself to 0.95 at most, but for cells of one module of ELPV, once.

References:
    Shi and Malik, "Normalized Cuts and Image Segmentation", 2000.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from anomalib_metarefine.refinement.patches import place_scale, scale_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.features.neighbours import NearestImages
    from anomalib_metarefine.features.shards import Shard

FEWEST_IMAGES = 20  # fewer say nothing of a folder, and are no product of their own
_EVERYWHERE = 1.5  # spreads above the usual, of the median patch of an image
_AMONG_EACH_OTHER = 0.62  # share of the patches of a variant
_STRANGER = 0.3  # an image with fewer of its patches than that among the others is none of the variant
_BELONGS = 0.5  # and one with more is, however usual it is
_FEWEST = 5  # images of a variant
_LEAST_SHARE = 0.02  # of the images
_LEAST = np.float32(1e-6)  # distance whose logarithm is taken
_FEWEST_REFERENCES = 5  # and no fewer of those that images are compared with
_OWN_PRODUCT = 0.97  # agreement within both sides of a cut


class GivenVariants(NamedTuple):
    """The user's own grouping of images.

    Attributes:
        numbers (np.ndarray): ``[N]`` number of each image's variant; 0 is the largest.
        names (tuple[str, ...]): What the user calls each.
    """

    numbers: np.ndarray
    names: tuple[str, ...]


def given_variants(labels: Sequence[str]) -> GivenVariants:
    """A variant for every name that the user gives images.

    Example:
        >>> given_variants(["mono", "poly", "poly"])
        GivenVariants(numbers=array([1, 0, 0]), names=('poly', 'mono'))
    """
    counts = Counter(labels)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    number = {name: i for i, name in enumerate(names)}
    return GivenVariants(np.array([number[label] for label in labels]), tuple(names))


def folder_names(paths: Sequence[str]) -> list[str]:
    """The folder that each image lies in, below the one that all have in common.

    Example:
        >>> folder_names(["line/mono/1.png", "line/poly/left/1.png"])
        ['mono', 'poly/left']
    """
    folders = [Path(path).parent for path in paths]
    common = Path(os.path.commonpath(folders))
    if folders.count(common) == len(folders):
        return [common.name] * len(folders)
    return [folder.relative_to(common).as_posix() for folder in folders]


def products(neighbours: NearestImages) -> np.ndarray:
    """Number of each image's product, ``[N]``; 0 is the largest."""
    nearest, count = neighbours.nearest_references(), len(neighbours.store)
    fewest = max(_FEWEST_REFERENCES, round(FEWEST_IMAGES * len(nearest) / count))
    waiting, groups = [np.arange(len(nearest))], []
    while waiting:
        own = waiting.pop()
        cut = _cut(nearest[np.ix_(own, own)], fewest)
        waiting += [] if cut is None else [own[cut], own[~cut]]
        groups += [own] if cut is None else []
    if len(groups) == 1:
        return np.zeros(count, dtype=int)
    members = np.zeros((count, len(groups)), dtype=bool)
    for i, own in enumerate(groups):
        members[neighbours.chosen[own], i] = True
    belongs = neighbours.share_nearest(members).argmax(1)
    place = np.bincount(belongs, minlength=len(groups)).argsort(kind="stable")[::-1].argsort()
    return place[belongs]


def _cut(nearest: np.ndarray, fewest: int) -> np.ndarray | None:
    """One side of the best cut of images in two, ``[M]`` mask; ``None`` if they are of one product.

    Args:
        nearest (np.ndarray): ``[M x M]`` share of the patches of each image whose nearest image is each.
        fewest (int): Images of a side.
    """
    count = len(nearest)
    if count < 2 * fewest:
        return None
    weights = nearest + nearest.T
    scale = 1 / np.sqrt(np.maximum(weights.sum(1), 1e-9))
    vectors = np.linalg.eigh(scale[:, None] * weights * scale)[1]
    order = np.argsort(vectors[:, -2] * scale)
    sizes = np.arange(fewest, count - fewest + 1)
    agreement = np.minimum(_agreement(nearest, order, sizes), _agreement(nearest, order[::-1], count - sizes))
    best = agreement.argmax()
    if agreement[best] < _OWN_PRODUCT:
        return None
    return np.isin(np.arange(count), order[: sizes[best]])


def _agreement(nearest: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How many of the patches of the first images of an order find their like among these, for each size ``[S]``.

    Above chance: 0 if no more than their share of the images, 1 if all.
    """
    ordered = nearest[np.ix_(order, order)]
    ordered = ordered / np.maximum(ordered.sum(1, keepdims=True), 1e-9)
    within = ordered.cumsum(0).cumsum(1)[sizes - 1, sizes - 1] / sizes
    chance = sizes / len(nearest)
    return (within - chance) / (1 - chance)


def minority(neighbours: NearestImages, own: np.ndarray, tail: float) -> np.ndarray:
    """Of the images of a product (``[N]`` mask), those of another variant than most, ``[N]`` mask."""
    store = neighbours.store
    neighbours.keep_distances(own, tail)
    logs = np.log(np.maximum(store.read("distances", scale_rows(np.flatnonzero(own))), _LEAST))
    group = own & (store.per_image(_elsewhere, place_scale(logs)) > _EVERYWHERE)
    group &= neighbours.share_nearest(group[:, None])[:, 0] > _STRANGER
    among = neighbours.share_nearest(group[:, None])[:, 0]
    if group.sum() < max(_FEWEST, _LEAST_SHARE * own.sum()) or among[group].mean() < _AMONG_EACH_OTHER:
        return np.zeros(len(own), dtype=bool)
    return group | (own & (among > _BELONGS))


def _elsewhere(shard: Shard, scale: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """How far the median patch of each image lies from what is usual for its place, in spreads, ``[n]``."""
    median, spread = scale
    return np.median((np.log(np.maximum(shard.read("distances"), _LEAST)) - median) / spread, axis=1)
