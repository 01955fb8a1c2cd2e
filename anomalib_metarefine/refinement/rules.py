"""Rejection rules: from the scores of a training set to the images that are rejected.

A rule is one object with one method. Every rule is invariant to the order of the images, moves with a shift and a scale
of the scores, rejects nothing where they have no spread, and never rejects every image; `run_rounds` keeps half of the
images at least, whatever a rule says. docs/rules.md compares the rules on real scores.

*Breakdown point* is the share of images whose scores may be arbitrarily high before the fence can be arbitrarily far
from the scores of the clean images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from anomalib_metarefine.refinement.scales import Scales
from anomalib_metarefine.robust import NORMAL_MAD, lower_side_scale
from anomalib_metarefine.rule_settings import (
    AutoSettings,
    CountSettings,
    IQRSettings,
    MADSettings,
    ShareSettings,
    parse_rule,
)


class Rejection(NamedTuple):
    """What a rule answers.

    Attributes:
        images (np.ndarray): ``[N]`` mask of the rejected images.
        fence (float): The score that every one of them lies past; infinity if there is none.
    """

    images: np.ndarray
    fence: float


class Rule(Protocol):
    """A rejection rule."""

    def reject(self, scales: Scales) -> Rejection:
        """The images to reject.

        Args:
            scales (Scales): Scores of the ``N`` images, and what else is known of them.
        """
        ...


@dataclass(frozen=True)
class TukeyFence(IQRSettings):
    """Upper inter-quartile-range fence ``Q3 + whisker * IQR``, the rule of the MetaRefine paper.

    Breakdown point 25 %: with more dirty images than that, Q3 is dirty itself and the fence moves out of reach. Keeps
    the images up to Q3 at least. Use it to compare with the paper, or where a few per cent at most are dirty.

    Args:
        whisker (float): Above 0.

    References:
        Tukey, "Exploratory Data Analysis", 1977; Aqeel et al., arXiv 2503.01569.
    """

    def reject(self, scales: Scales) -> Rejection:
        """See `Rule.reject`."""
        lower, upper = np.quantile(scales.scores, [0.25, 0.75])
        return _past(scales.scores, upper + self.whisker * (upper - lower) if upper > lower else math.inf)


@dataclass(frozen=True)
class MADFence(MADSettings):
    """``median + k * 1.4826 * MAD``, where MAD is the median absolute deviation from the median.

    Breakdown point 50 %; towards it the median climbs into the upper half of the clean scores, and MAD grows with it.
    Keeps at least half of the images. Use it where clean scores are about normal: of skewed ones it rejects the tail.

    Args:
        k (float): Above 0.

    References:
        Hampel, "The Influence Curve and Its Role in Robust Estimation", 1974; Leys et al., "Detecting outliers: Do not
        use standard deviation around the mean, use absolute deviation around the median", 2013 (for 3, or 2.5).
    """

    def reject(self, scales: Scales) -> Rejection:
        """See `Rule.reject`."""
        centre = float(np.median(scales.scores))
        spread = NORMAL_MAD * float(np.median(np.abs(scales.scores - centre)))
        return _past(scales.scores, centre + self.k * spread if spread > 0 else math.inf)


@dataclass(frozen=True)
class FalseDiscoveryRate(AutoSettings):
    """Rejects what two witnesses speak against, as long as few clean images are expected among it. The default.

    The distance to other images tells how unusual an image is. Its likeness tells whether it is unusual in the way that
    *other* suspicious images are: an odd but clean image is odd in a way of its own, defects recur. Each becomes a
    p-value under a reference for clean images, an exponential tail ``exp(-u / tail)`` of the distance ``u`` from the
    centre in lower-side spreads (`lower_side_scale`); Fisher's method makes one p-value of the two, and the procedure
    of Benjamini and Hochberg rejects the images of the smallest. It adapts to the contamination: one outlier must be
    extreme, but where a third of the images stand out, less is enough. Neither witness is enough by itself: both must
    lie more than ``tail`` spreads above their centre. Breakdown point 50 %, as that of centre and spread. The
    likelihood, which orders the images, is no witness: it speaks against every image of a good minority.

    Where images are too few to tell, or share too little to be compared (`Structure`), none is rejected.

    Args:
        level (float): Expected share of clean images among the rejected, in (0, 1).
        tail (float): Spreads over which the reference falls to ``1 / e``; above 0.

    References:
        Fisher, "Statistical Methods for Research Workers", 1932 (sum of the logarithms of p-values); Benjamini and
        Hochberg, "Controlling the False Discovery Rate", 1995.
    """

    def reject(self, scales: Scales) -> Rejection:
        """See `Rule.reject`."""
        images = np.zeros(len(scales.scores), dtype=bool)
        if scales.likeness is not None and scales.comparable:
            images = (q_values(scales, self.tail) <= self.level) & (np.min(_witnesses(scales), axis=0) > self.tail)
        # Others may lie past this fence that only one witness speaks against.
        return Rejection(
            images, float(np.nextafter(scales.scores[images].min(), -math.inf)) if images.any() else math.inf
        )


@dataclass(frozen=True)
class ShareFence(ShareSettings):
    """Rejects the ``floor(share * N)`` highest of ``N`` scores, for a user who knows the share of dirty images.

    The fence is an order statistic, the highest score to keep. Where a tie lies across it, all of the tie is kept:
    never more images than asked are rejected. Breakdown point: ``share``. Use it only where the share is known: it
    rejects as many from a clean set.

    Args:
        share (float): In [0, 0.5].

    References:
        Tukey and McLaughlin, "Less Vulnerable Confidence and Significance Procedures for Location Based on a Single
        Sample", 1963 (trimming).
    """

    def reject(self, scales: Scales) -> Rejection:
        """See `Rule.reject`."""
        # 0.29 * 100 is 28.999999999999996, and the user means 29.
        return _highest(scales.scores, math.floor(self.share * len(scales.scores) + 1e-9))


@dataclass(frozen=True)
class CountFence(CountSettings):
    """Rejects the ``count`` highest scores, for a user who knows the number of dirty images; all but one at most.

    Ties as in `ShareFence`. Breakdown point: ``count / N``. Use it with a known number or a budget, "the 20 worst".

    Args:
        count (int): At least 0.

    References:
        As `ShareFence`.
    """

    def reject(self, scales: Scales) -> Rejection:
        """See `Rule.reject`."""
        return _highest(scales.scores, min(self.count, len(scales.scores) - 1))


RULES: dict[str, type[Any]] = {
    "auto": FalseDiscoveryRate,
    "count": CountFence,
    "iqr": TukeyFence,
    "mad": MADFence,
    "share": ShareFence,
}


def get_rule(spec: str) -> Rule:
    """The rule that a short text describes.

    Args:
        spec (str): A name of `RULES`, by itself or with settings: ``"iqr"``, ``"iqr:whisker=3"``,
            ``"auto:level=0.05,tail=2"``. The first setting may go without its name: ``"share:0.1"``.

    Returns:
        Rule: The rule, with defaults for the settings that ``spec`` leaves out.

    Raises:
        ValueError: If there is no rule of that name, or a setting is unknown, missing or out of range.

    Example:
        >>> get_rule("share:0.2")
        ShareFence(share=0.2)
    """
    name, settings = parse_rule(spec)
    return RULES[name](**settings)


def q_values(scales: Scales, tail: float = AutoSettings.tail) -> np.ndarray:
    """Expected share of clean images among an image and all that the witnesses speak against as much.

    Args:
        scales (Scales): Scores, and likeness if there is one.
        tail (float): See `FalseDiscoveryRate`.

    Returns:
        np.ndarray: ``[N]`` in [0, 1]; all 1 where neither varies.

    References:
        Storey, "A direct approach to false discovery rates", 2002.

    Example:
        >>> q_values(Scales(np.array([1.0, 2.0, 3.0, 4.0, 40.0])), tail=1.6).round(2)
        array([1.  , 1.  , 0.72, 0.46, 0.  ])
    """
    witnesses = _witnesses(scales)
    evidence = sum(witnesses) / tail
    p_values = np.exp(-evidence)
    if len(witnesses) > 1:  # the sum of two exponential variables follows a gamma distribution: Fisher's method
        p_values *= 1 + evidence
    order = np.argsort(p_values, kind="stable")
    # Of equal images all have the p-value; the lowest share from here on is what a limit at this p-value promises.
    shares = p_values[order] * len(order) / np.arange(1, len(order) + 1)
    result = np.empty(len(order))
    result[order] = np.minimum.accumulate(shares[::-1])[::-1]
    return result.clip(0, 1)


def _witnesses(scales: Scales) -> list[np.ndarray]:
    """What speaks against each image, ``[N]`` in spreads: distance or score, and likeness if there is one."""
    first = scales.scores if scales.distance is None else scales.distance
    values = [first] if scales.likeness is None else [first, scales.likeness]
    return [_spreads(one, scales.kept) for one in values]


def _spreads(values: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """How many lower-side spreads of the kept images each value lies above their centre, at least 0; 0 for a NaN."""
    known = np.isfinite(values)
    usual = values[known if kept is None else known & kept]
    centre, spread = lower_side_scale(usual) if len(usual) else (0.0, 0.0)
    return np.where(known, np.maximum(values - centre, 0) / spread, 0.0) if spread > 0 else np.zeros(len(values))


def _past(scores: np.ndarray, fence: float) -> Rejection:
    return Rejection(scores > fence, float(fence))


def _highest(scores: np.ndarray, count: int) -> Rejection:
    """The ``count`` highest scores, fewer where a tie lies across the fence."""
    ordered = np.sort(scores)
    fence = float(ordered[len(ordered) - 1 - count])
    return _past(scores, fence if fence < ordered[-1] else math.inf)
