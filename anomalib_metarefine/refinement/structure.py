"""What kind of folder it is: an aligned product, several variants, parts anywhere, or images that share little.

Scores compare images place by place. Whether that means anything is found out before an image is judged:

- *layout*: the share of the variance of patches that their place explains. Where every image shows another piece of
  layout, next to none.
- *reliability*: would other images say the same? Scores against one half of the images are correlated with scores
  against the other half. Where parts lie anywhere, which image happens to lie alike decides, and the two disagree.

Variants, and the products that a folder mixes, are told apart first: see `variants`.

The limits were read off six families of images (ELPV mono and poly, MVTec AD `screw`, KolektorSDD, DeepPCB, toy
figures) of 31 to 300 images with 0 to 40 % defects: reliability 0.42 to 0.96 where parts lie alike, -0.5 to 0.3 on
`screw`; layout 0.18 to 0.74, on DeepPCB 0.04 to 0.07.

References:
    Spearman, "Correlation calculated from faulty data", 1910, and Brown, "Some experimental results in the correlation
    of mental abilities", 1910 (split-half reliability).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from scipy.stats import spearmanr

from anomalib_metarefine.images.sources import listing
from anomalib_metarefine.refinement.fitting import FEWEST_LEARNED
from anomalib_metarefine.refinement.variants import FEWEST_IMAGES, GivenVariants, minority, products

if TYPE_CHECKING:
    from anomalib_metarefine.features.neighbours import NearestImages

Kind = Literal["aligned", "anywhere", "unlike"]

_SAID = {"anywhere": "parts that lie anywhere", "unlike": "images that share too little"}
_SPLITS = 4  # of the images into halves
_LEAST_RELIABILITY = 0.35
_LEAST_LAYOUT = 0.1
_RELIABLE_ANYWAY = 0.75  # textures have no layout, and are compared well all the same


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
        given = GivenVariants(products(neighbours) if look_for_variants else np.zeros(count, dtype=int), ())
    else:
        look_for_variants = False
    variants, names = given
    counts, layouts = np.bincount(variants), neighbours.layouts(variants)
    layout = float(np.average(np.nan_to_num(layouts), weights=counts * np.isfinite(layouts)))
    large = counts >= FEWEST_IMAGES
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
                small = minority(neighbours, variants == product, tail)
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
        for variant in np.flatnonzero(counts >= FEWEST_IMAGES):
            own = variants == variant
            alike = min(np.ptp(one[own]), np.ptp(other[own])) == 0
            found[split, variant] = 1.0 if alike else spearmanr(one[own], other[own]).statistic
    return found.mean(0)
