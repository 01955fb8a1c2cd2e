"""What kind of folder it is: an aligned product, several variants, parts anywhere, or images that share little.

Scores compare images place by place. Whether that means anything is found out before an image is judged:

- *layout*: the share of the variance of patches that their place explains. Where every image shows another piece of
  layout, next to none.
- *reliability*: would other images say the same? Scores against one half of the images are correlated with scores
  against the other half. Where parts lie anywhere, which image happens to lie alike decides, and the two disagree.
- *products*: images of one product find their like among each other and hardly ever elsewhere. The graph of which
  image is nearest to which is cut in two where the fewest patches cross, again and again (normalised cuts).
- *variants*: another lot or camera differs from the majority *everywhere*, and its images are alike; a defect differs
  *somewhere*. So, product by product, images are looked for most of whose patches are unusual for their place, and
  whose patches find their nearest like among each other.

The limits were read off six families of images (ELPV mono and poly, MVTec AD `screw`, KolektorSDD, DeepPCB, toy
figures) of 31 to 300 images with 0 to 40 % defects: reliability 0.42 to 0.96 where parts lie alike, -0.5 to 0.3 on
`screw`; layout 0.18 to 0.74, on DeepPCB 0.04 to 0.07; of the patches of a variant 68 to 83 % find their like among
each other, of defects that cover much of the image 57 % at most. Mixed products agree within themselves to 0.98 and
more (`_agreement`), a product by itself to 0.95 at most: ELPV has cells of several modules.

References:
    Shi and Malik, "Normalized Cuts and Image Segmentation", 2000.
    Spearman, "Correlation calculated from faulty data", 1910, and Brown, "Some experimental results in the correlation
    of mental abilities", 1910 (split-half reliability).
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from scipy.stats import spearmanr

from anomalib_metarefine.images.sources import listing
from anomalib_metarefine.refinement.fitting import FEWEST_LEARNED
from anomalib_metarefine.refinement.patches import place_scale, scale_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.features.neighbours import NearestImages
    from anomalib_metarefine.features.shards import Shard

Kind = Literal["aligned", "anywhere", "unlike"]

_SAID = {"anywhere": "parts that lie anywhere", "unlike": "images that share too little"}
_SPLITS = 4  # of the images into halves
_LEAST_RELIABILITY = 0.35
_LEAST_LAYOUT = 0.1
_RELIABLE_ANYWAY = 0.75  # textures have no layout, and are compared well all the same
_EVERYWHERE = 1.5  # spreads above the usual, of the median patch of an image
_AMONG_EACH_OTHER = 0.62  # share of the patches of a variant
_STRANGER = 0.3  # an image with fewer of its patches than that among the others is none of the variant
_BELONGS = 0.5  # and one with more is, however usual it is
_FEWEST = 5  # images of a variant
_LEAST_SHARE = 0.02  # of the images
_LEAST = np.float32(1e-6)  # distance whose logarithm is taken
_FEWEST_IMAGES = 20  # fewer say nothing of a folder, and are no product of their own
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


@dataclass(frozen=True)
class Structure:
    """What kind of folder it is.

    Attributes:
        kind (Kind): ``"aligned"``, ``"anywhere"`` (parts lie anywhere) or ``"unlike"`` (images share too little); of
            several variants that differ in it, ``"aligned"`` if any is.
        layout (float): Share of the variance of patches that their place explains, in [0, 1]; mean over the images.
        reliability (float): Rank correlation of scores against two halves of the images, in the mean over the images;
            NaN where there are too few.
        variants (np.ndarray): ``[N]`` number of each image's variant; 0 is the largest.
        names (tuple[str, ...]): What the user calls each variant; empty if variants were looked for.
        kinds (tuple[Kind, ...]): Of each variant, where they differ.
        unlearned (int): Kept images of variants that are too small to have statistics of their own.
    """

    kind: Kind
    layout: float
    reliability: float
    variants: np.ndarray
    names: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    unlearned: int = 0

    @property
    def comparable(self) -> bool:
        """Whether a score says enough for a rule to reject an image by it."""
        return self.kind == "aligned"

    @property
    def judged(self) -> np.ndarray:
        """``[N]`` mask of the images whose variant is comparable."""
        if not self.kinds:
            return np.full(len(self.variants), self.comparable)
        return np.array([kind == "aligned" for kind in self.kinds])[self.variants]

    def describe(self) -> str:
        """The folder in a sentence, with the evidence; another says what a model of it won't know."""
        if self.unlearned:
            images = f"{self.unlearned} kept image{'s' * (self.unlearned > 1)}"
            reason = (
                f"of variants of fewer than {FEWEST_LEARNED} can't be learned: a model will find their like unusual."
            )
            return f"{replace(self, unlearned=0).describe()} {images} {reason}"
        given = f"{self._listing()}. " if self.names or self.variants.any() else ""
        if np.isnan(self.layout):
            return f"{given}Images were not compared with each other."
        evidence = f"place explains {self.layout:.0%} of what patches show"
        if np.isfinite(self.reliability):
            evidence += f", two halves of the images agree to {self.reliability:.2f} on the scores"
        if self.kind == "unlike":
            text = f"{given}Images that share too little to be compared: their order is a hint, and no image is judged"
        elif self.kind == "anywhere":
            text = f"{given}Parts that lie anywhere: images can be ordered, but no fence can be relied on"
        elif self.names or self.variants.any():
            text = self._listing()
        else:
            text = "One aligned product"
        names = self.names or [f"variant {number}" for number in range(len(self.kinds))]
        others = [f"{name}: {_SAID[kind]}" for name, kind in zip(names, self.kinds, strict=False) if kind in _SAID]
        judged = f" No image of these is judged, train them apart: {listing(others, limit=8)}." if others else ""
        return f"{text} ({evidence}).{judged}"

    def _listing(self) -> str:
        counts = np.bincount(self.variants).tolist()
        if not self.names:
            return f"{len(counts)} variants, of {', '.join(map(str, counts))} images"
        named = [f"{name} ({count} images)" for name, count in zip(self.names, counts, strict=True)]
        return f"{len(counts)} variant{'s' * (len(counts) > 1)}, as given: {listing(named, limit=8)}"

    def summary(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "kind": self.kind,
            **{name: _figure(value) for name, value in (("layout", self.layout), ("reliability", self.reliability))},
            "variants": np.bincount(self.variants).tolist(),
            "names": list(self.names),
            "kinds": list(self.kinds),
            "text": self.describe(),
        }


def _figure(value: float) -> float | None:
    """JSON has no NaN."""
    return round(value, 3) if np.isfinite(value) else None


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


def find_structure(
    neighbours: NearestImages,
    tail: float,
    seed: int,
    kind: Kind | Literal["auto"],
    given: GivenVariants | None = None,
    *,
    look_for_variants: bool = True,
) -> Structure:
    """Look at how images find their like among each other.

    Args:
        neighbours (NearestImages): Of all ``N`` images.
        tail (float): Share of the patches that make the distance of an image.
        seed (int): Of the splits.
        kind (Kind | Literal["auto"]): What the user says it is; ``"auto"`` finds out.
        given (GivenVariants | None): The user's own variants.
        look_for_variants (bool): Find variants where none are given.

    Raises:
        ValueError: If there is no such kind.
    """
    count = len(neighbours.store)
    if kind not in ("auto", *get_args(Kind)):
        msg = f"structure must be auto or one of {', '.join(get_args(Kind))}, found {kind!r}."
        raise ValueError(msg)
    if given is None:
        given = GivenVariants(_products(neighbours) if look_for_variants else np.zeros(count, dtype=int), ())
    else:
        look_for_variants = False
    variants, names = given
    counts, layouts = np.bincount(variants), neighbours.layouts(variants)
    layout = float(np.average(np.nan_to_num(layouts), weights=counts * np.isfinite(layouts)))
    large = counts >= _FEWEST_IMAGES
    if not large.any():
        return Structure("aligned" if kind == "auto" else kind, layout, float("nan"), variants, names)
    reliabilities = _split_half(neighbours, variants, tail, np.random.default_rng(seed))
    reliability = float(np.average(reliabilities[large], weights=counts[large]))
    kinds: tuple[Kind, ...] = ()
    if kind != "auto":
        whole: Kind = kind
    else:
        kinds = tuple(
            _kind(*evidence) if enough else "aligned"
            for *evidence, enough in zip(layouts, reliabilities, large, strict=True)
        )
        whole = "aligned" if "aligned" in kinds else max(kinds, key=kinds.count)
        kinds = kinds if len(set(kinds)) > 1 else ()
    if whole == "aligned" and look_for_variants:
        for product in range(len(counts)):
            if not kinds or kinds[product] == "aligned":
                small = _minority(neighbours, variants == product, tail)
                variants = np.where(small, variants.max() + 1, variants)
                kinds = (*kinds, "aligned") if kinds and small.any() else kinds
    return Structure(whole, layout, reliability, variants, names, kinds)


def _kind(layout: float, reliability: float) -> Kind:
    if layout < _LEAST_LAYOUT and reliability < _RELIABLE_ANYWAY:
        return "unlike"
    return "aligned" if reliability >= _LEAST_RELIABILITY else "anywhere"


def _split_half(
    neighbours: NearestImages, variants: np.ndarray, tail: float, generator: np.random.Generator
) -> np.ndarray:
    """Of each variant by itself: between them, scores differ whatever half they come from. NaN for small ones."""
    count, counts = len(variants), np.bincount(variants)
    found = np.full((_SPLITS, len(counts)), np.nan)
    halves = np.zeros((_SPLITS, count), dtype=bool)
    for half in halves:
        half[generator.permutation(count)[: count // 2]] = True
    distances = neighbours.image_distances([*halves, *~halves], tail)
    for split, (one, other) in enumerate(zip(distances[:_SPLITS], distances[_SPLITS:], strict=True)):
        for variant in np.flatnonzero(counts >= _FEWEST_IMAGES):
            own = variants == variant
            alike = min(np.ptp(one[own]), np.ptp(other[own])) == 0
            found[split, variant] = 1.0 if alike else spearmanr(one[own], other[own]).statistic
    return found.mean(0)


def _products(neighbours: NearestImages) -> np.ndarray:
    """Number of each image's product, ``[N]``; 0 is the largest."""
    nearest, count = neighbours.nearest_references(), len(neighbours.store)
    fewest = max(_FEWEST_REFERENCES, round(_FEWEST_IMAGES * len(nearest) / count))
    waiting, groups = [np.arange(len(nearest))], []
    while waiting:
        own = waiting.pop()
        cut = _cut(nearest[np.ix_(own, own)], fewest)
        waiting += [] if cut is None else [own[cut], own[~cut]]
        groups += [own] if cut is None else []
    if len(groups) == 1:
        return np.zeros(count, dtype=int)
    number = np.empty(len(nearest), dtype=int)
    for i, own in enumerate(groups):
        number[own] = i
    belongs = neighbours.share_nearest(number[:, None] == np.arange(len(groups))).argmax(1)
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


def _minority(neighbours: NearestImages, own: np.ndarray, tail: float) -> np.ndarray:
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
