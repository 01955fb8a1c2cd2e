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
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from anomalib_metarefine.robust import NORMAL_MAD, lower_side_scale
from anomalib_metarefine.rule_settings import (
    AutoSettings,
    CountSettings,
    IQRSettings,
    MADSettings,
    ShareSettings,
    parse_rule,
)

if TYPE_CHECKING:
    from anomalib_metarefine.refinement.scales import Scales


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
    """Rejects the highest scores as long as few clean ones are expected among them. The default.

    A score is turned into a p-value under a reference for clean images, an exponential tail ``exp(-u / tail)`` of the
    distance ``u`` from the centre in lower-side spreads (`lower_side_scale`), and the procedure of Benjamini and
    Hochberg sets the fence. It adapts to the contamination: one outlier must be extreme to be rejected, but where a
    third of the images stand out, less is enough. Breakdown point 50 %, as that of its centre and spread. Keeps more
    than a quarter of the images.

    One score is one witness. An odd but clean image is odd in a way of its own, defects recur: so an image past the
    fence is only rejected if it is also like *other* suspicious images (`likeness`), which is told by other numbers.
    Where images are too few to tell, or share too little to be compared (`Structure`), none is rejected.

    Args:
        level (float): Expected share of clean images among those past the fence, in (0, 1).
        tail (float): Spreads over which the reference falls to ``1 / e``; above 0.
        alike (float): Spreads of likeness that a rejected image has at least.

    References:
        Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995.
    """

    def reject(self, scales: Scales) -> Rejection:
        """See `Rule.reject`."""
        nothing = Rejection(np.zeros(len(scales.scores), dtype=bool), math.inf)
        if scales.likeness is None or not scales.comparable:
            return nothing
        past = q_values(scales.scores, self.tail) <= self.level
        if not past.any() or past.all():
            return nothing
        fence = float(scales.scores[~past].max())
        images = past & (scales.likeness > self.alike)
        return Rejection(images, fence) if images.any() else nothing


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


def q_values(scores: np.ndarray, tail: float = AutoSettings.tail) -> np.ndarray:
    """Expected share of clean images among an image and all that score at least as high.

    Args:
        scores (np.ndarray): ``[N]``, higher is more anomalous.
        tail (float): See `FalseDiscoveryRate`.

    Returns:
        np.ndarray: ``[N]`` in [0, 1]; all 1 where the scores have no spread.

    References:
        Storey, "A direct approach to false discovery rates", 2002.

    Example:
        >>> q_values(np.array([1.0, 2.0, 3.0, 4.0, 40.0])).round(2)
        array([1.  , 1.  , 0.72, 0.46, 0.  ])
    """
    centre, spread = lower_side_scale(scores)
    if spread <= 0:
        return np.ones(len(scores))
    order = np.argsort(-scores, kind="stable")
    p_values = np.exp(-np.maximum(scores[order] - centre, 0) / (spread * tail))
    # Of equal scores all have the p-value; the lowest share from here on down is what a fence at the score promises.
    shares = p_values * len(scores) / np.arange(1, len(scores) + 1)
    result = np.empty(len(scores))
    result[order] = np.minimum.accumulate(shares[::-1])[::-1]
    return result.clip(0, 1)


def _past(scores: np.ndarray, fence: float) -> Rejection:
    return Rejection(scores > fence, float(fence))


def _highest(scores: np.ndarray, count: int) -> Rejection:
    """The ``count`` highest scores, fewer where a tie lies across the fence."""
    ordered = np.sort(scores)
    fence = float(ordered[len(ordered) - 1 - count])
    return _past(scores, fence if fence < ordered[-1] else math.inf)
