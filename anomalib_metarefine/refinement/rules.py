"""Rejection rules: from the scores of a training set to the fence past which an image is rejected.

A rule is one object with one method. Every rule is invariant to the order of the scores, moves with a shift and a scale
of them, answers infinity (reject nothing) where the scores have no spread, and never rejects every image. ``refine``
keeps at least half of the images whatever a rule says; what a rule guarantees by itself stands in its docstring.

*Breakdown point* is the share of images whose scores may be arbitrarily high before the fence can be arbitrarily far
from the scores of the clean images. docs/rules.md compares the rules on real scores.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol, get_type_hints

import numpy as np

from anomalib_metarefine.robust import NORMAL_MAD, lower_side_scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MIXTURE_FEWEST = 10  # scores; the five parameters of two components are not to be had from fewer
_MIXTURE_LIMITS = (-4.0, 12.0)  # lower-side spreads: beyond, how far out a score lies must not shape a component
_MIXTURE_VARIANCE = 0.01  # squared spreads: no component narrower than a tenth of one, so that small ties are none
_MIXTURE_STARTS = (0.5, 0.25, 0.1, 0.05)  # share of the scores that the upper component starts from
_FEWEST_ANSWERS = 20  # of a person, for a fence: what was measured


class Rule(Protocol):
    """A rejection rule."""

    def fence(self, scores: np.ndarray) -> float:
        """The score past which an image is rejected.

        Args:
            scores (np.ndarray): ``[N]``, finite; higher is more anomalous.

        Returns:
            float: Images with a score strictly above it are rejected; infinity rejects none.
        """
        ...


@dataclass(frozen=True)
class TukeyFence:
    """Upper inter-quartile-range fence ``Q3 + whisker * IQR``, the rule of the MetaRefine paper.

    Breakdown point 25 %: with more dirty images than that, Q3 is dirty itself and the fence moves out of reach. Keeps
    the images up to Q3 at least. Use it to compare with the paper, or where a few per cent at most are dirty.

    Args:
        whisker (float): Above 0.

    References:
        Tukey, "Exploratory Data Analysis", 1977; Aqeel et al., arXiv 2503.01569.

    Example:
        >>> TukeyFence().fence(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
        7.0
    """

    whisker: float = 1.5

    def __post_init__(self) -> None:
        _check_positive(self, "whisker")

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        lower, upper = np.quantile(scores, [0.25, 0.75])
        return float(upper + self.whisker * (upper - lower)) if upper > lower else float("inf")


@dataclass(frozen=True)
class MADFence:
    """``median + k * 1.4826 * MAD``, where MAD is the median absolute deviation from the median.

    Breakdown point 50 %; towards it the median climbs into the upper half of the clean scores, and MAD grows with it.
    Keeps at least half of the images. Use it where clean scores are about normal: of skewed ones it rejects the tail.

    Args:
        k (float): Above 0.

    References:
        Hampel, "The Influence Curve and Its Role in Robust Estimation", 1974; Leys et al., "Detecting outliers: Do not
        use standard deviation around the mean, use absolute deviation around the median", 2013 (for 3, or 2.5).

    Example:
        >>> round(MADFence().fence(np.array([1.0, 2.0, 3.0, 4.0, 5.0])), 4)
        7.4478
    """

    k: float = 3.0

    def __post_init__(self) -> None:
        _check_positive(self, "k")

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        centre = float(np.median(scores))
        spread = NORMAL_MAD * float(np.median(np.abs(scores - centre)))
        return centre + self.k * spread if spread > 0 else float("inf")


@dataclass(frozen=True)
class ShorthFence:
    """A fence anchored in the densest half of the scores: ``centre + width * spread``.

    Centre is the median of the shortest interval that holds half of the scores (the shorth), spread the scaled median
    distance of the scores *below* it (`lower_side_scale`). Defects raise a score, so they reach neither before they are
    the majority: breakdown point 50 %. (The half-sample mode as the centre is `ModeFence`; on 300 scores it jumps about
    so much that clean sets lost up to half of their images.) Keeps more than a quarter of the images. Use it where
    dirty images stand well apart and the share is unknown.

    Args:
        width (float): Above 0.

    References:
        Andrews et al., "Robust Estimates of Location", 1972 (the shorth); Rousseeuw, "Least Median of Squares
        Regression", 1984.
    """

    width: float = 8.0

    def __post_init__(self) -> None:
        _check_positive(self, "width")

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        centre, spread = lower_side_scale(scores)
        return centre + self.width * spread if spread > 0 else float("inf")


@dataclass(frozen=True)
class FDRFence:
    """The lowest fence whose rejected images are expected to be clean in at most a share ``level`` of the cases.

    A score is turned into a p-value under a reference for clean images, an exponential tail ``exp(-u / tail)`` of the
    distance ``u`` from the centre in lower-side spreads (`lower_side_scale`), and the procedure of Benjamini and
    Hochberg sets the fence. It adapts to the contamination: one outlier must be extreme to be rejected, but where a
    third of the images stand out, less is enough. Breakdown point 50 %, as that of its centre and spread. Keeps more
    than a quarter of the images. Use it where the share is unknown, clean sets included.

    The reference is heavier than a normal tail because clean image scores are: on clean ELPV, 5 % lie past 4 spreads.
    Where a data set's clean tail is heavier still, more clean images are rejected than ``level`` says.

    Args:
        level (float): In (0, 1).
        tail (float): Spreads over which the reference falls to ``1 / e``; above 0.

    References:
        Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995.
    """

    level: float = 0.1
    tail: float = 1.6

    def __post_init__(self) -> None:
        _check(self, "level", 0 < self.level < 1, "a share in (0, 1)")
        _check_positive(self, "tail")

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        centre, spread = lower_side_scale(scores)
        if spread <= 0:
            return float("inf")
        descending = np.sort(scores)[::-1]
        p_values = np.exp(-np.maximum(descending - centre, 0) / (spread * self.tail))
        allowed = self.level * np.arange(1, len(scores) + 1) / len(scores)
        passed = np.flatnonzero(p_values <= allowed)
        # As `level` < 1 a score at the centre (p-value 1) never passes, so there is always a next one.
        return float(descending[passed[-1] + 1]) if len(passed) else float("inf")


@dataclass(frozen=True)
class MixtureFence:
    """Where the upper of two normal components becomes the likelier one; infinity if one component is enough.

    Scores are put in lower-side spreads from the centre (`lower_side_scale`) and clipped to [-4, 12]. Gaussian mixtures
    of one and of two components are fitted by expectation-maximisation, from fixed starts; the lower Bayesian
    information criterion (BIC) wins. The fence is where the posterior of the upper component,
    ``w2 N(x; m2, s2) / (w1 N(x; m1, s1) + w2 N(x; m2, s2))``, passes 1/2 on the right of the lower one's mean ``m1``.
    It is infinity where that never happens, would reject more than half of the images, or has fewer than 10 scores.

    Breakdown point 50 %, in that a finite fence lies at most 12 spreads above a centre that has this one. (Without the
    clipping one image would do: far enough out, it is a component.) But only where clean scores are about normal can
    one rely on two components being told apart, and the fence being finite. Keeps at least half of the images. Use it
    where the histogram shows two humps. One skewed hump it takes for two, and rejects the tail; many equal scores
    (copies of an image) may be a component, too.

    References:
        McLachlan and Peel, "Finite Mixture Models", 2000; Schwarz, "Estimating the Dimension of a Model", 1978 (BIC).
    """

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        centre, spread = lower_side_scale(scores)
        if spread <= 0 or len(scores) < _MIXTURE_FEWEST:
            return float("inf")
        standardised = ((np.sort(scores) - centre) / spread).clip(*_MIXTURE_LIMITS)
        crossing = _upper_component_from(standardised)
        rejected = int((standardised > crossing).sum())
        return centre + spread * crossing if 0 < rejected <= len(scores) / 2 else float("inf")


@dataclass(frozen=True)
class ShareFence:
    """Rejects the ``floor(share * N)`` highest of ``N`` scores, for a user who knows the share of dirty images.

    The fence is an order statistic, the highest score to keep. Where a tie lies across it, all of the tie is kept:
    never more images than asked are rejected. Breakdown point: ``share``, past which dirty images are kept and the
    fence is one of their scores. Keeps at least ``1 - share`` of the images. Use it only where the share is known: it
    rejects as many from a clean set.

    Args:
        share (float): In [0, 0.5]: refinement never rejects more than half of the images.

    References:
        Tukey and McLaughlin, "Less Vulnerable Confidence and Significance Procedures for Location Based on a Single
        Sample", 1963 (trimming).

    Example:
        >>> ShareFence(share=0.4).fence(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
        3.0
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "share", 0 <= self.share <= 0.5, "a share in [0, 0.5], as half of the images at least are kept")

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        # 0.29 * 100 is 28.999999999999996, and the user means 29.
        return _fence_below_highest(scores, math.floor(self.share * len(scores) + 1e-9))


@dataclass(frozen=True)
class CountFence:
    """Rejects the ``count`` highest scores, for a user who knows the number of dirty images; all but one at most.

    Ties as in `ShareFence`. Breakdown point: ``count / N``. Keeps at least ``N - count`` images (in ``refine``, half at
    least). Use it with a known number or a budget, "the 20 worst".

    Args:
        count (int): At least 0.

    References:
        As `ShareFence`.

    Example:
        >>> CountFence(count=1).fence(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
        4.0
    """

    count: int

    def __post_init__(self) -> None:
        _check(self, "count", isinstance(self.count, Integral) and self.count >= 0, "a whole number of at least 0")

    def fence(self, scores: np.ndarray) -> float:
        """See `Rule.fence`."""
        return _fence_below_highest(scores, min(self.count, len(scores) - 1))


@dataclass(frozen=True)
class PosteriorFence:
    """The lowest fence whose rejected images are expected to be clean in at most a share ``level`` of the cases.

    The expectation is over the posterior of `estimate_contamination`: shape and share of the clean and of the dirty
    scores are unknown, and all that explain the scores count. Where clean and dirty overlap, the posterior is wide and
    few are rejected. An image must be more probably dirty than clean, besides. Breakdown point 50 %, by the prior. The
    default. Where a person has looked at some images, the posterior knows, and the fence may come down for the others.

    Args:
        level (float): Expected share of clean images among those rejected, in (0, 1).

    References:
        Perini et al., "Estimating the Contamination Factor's Distribution in Unsupervised Anomaly Detection", 2023.
    """

    level: float = 0.15

    def __post_init__(self) -> None:
        _check(self, "level", 0 < self.level < 1, "a share in (0, 1)")

    def fence(
        self, scores: np.ndarray, known: Mapping[int, bool] | None = None, further: Sequence[np.ndarray] = ()
    ) -> float:
        """See `Rule.fence`.

        Args:
            scores (np.ndarray): ``[N]``, finite; higher is more anomalous.
            known (Mapping[int, bool] | None): Images that a person has decided to keep (true) or to reject. From 20 on
                the lower fence, with them or without, is taken: an answer is about its own image first, a few say
                little about the others, and those near the fence may be explained in ways that reject nothing. Where
                answers prove the fence without them wrong, more than ``level`` of the images past it being clean by
                the person's own word, it does not count.
            further (Sequence[np.ndarray]): The same images' scores on other scales, ``[N]`` each. Dirty images may
                stand apart on one scale and not on another: the fence past which most images lie is taken. Each of them
                keeps to ``level``.
        """
        known = known or {}
        scales = [scores, *further]
        fence = self._fence(scales, {})
        if len(known) < _FEWEST_ANSWERS:
            return fence
        told = self._fence(scales, known)
        past = scores > fence
        clean = sum(keep and past[image] for image, keep in known.items())
        return told if clean > self.level * past.sum() else min(fence, told)

    def _fence(self, scales: Sequence[np.ndarray], known: Mapping[int, bool]) -> float:
        past = max(self._past(scores, known) for scores in scales)
        return _fence_below_highest(scales[0], past) if past else float("inf")

    def _past(self, scores: np.ndarray, known: Mapping[int, bool]) -> int:
        """How many of the images lie past the fence of these scores."""
        from anomalib_metarefine.refinement.posterior import estimate_contamination

        order = np.argsort(scores, kind="stable")[::-1]
        probability = estimate_contamination(scores, known=known).dirty_probability[order]
        undecided = ~np.isin(order, list(known))
        expected = ((1 - probability) * undecided).cumsum() / undecided.cumsum().clip(1)
        rejected = np.flatnonzero((expected <= self.level) & (probability > 0.5) & undecided)
        return int(rejected[-1]) + 1 if len(rejected) else 0


RULES: dict[str, type[Rule]] = {
    "auto": PosteriorFence,
    "count": CountFence,
    "fdr": FDRFence,
    "iqr": TukeyFence,
    "mad": MADFence,
    "mixture": MixtureFence,
    "share": ShareFence,
    "shorth": ShorthFence,
}


def get_rule(spec: str) -> Rule:
    """The rule that a short text describes.

    Args:
        spec (str): A name of `RULES`, by itself or with settings: ``"iqr"``, ``"iqr:whisker=3"``,
            ``"fdr:level=0.05,tail=2"``. The first setting may go without its name: ``"share:0.1"``.

    Returns:
        Rule: The rule, with defaults for the settings that ``spec`` leaves out.

    Raises:
        ValueError: If there is no rule of that name, or a setting is unknown, missing or out of range.

    Example:
        >>> get_rule("share:0.2")
        ShareFence(share=0.2)
    """
    name, colon, text = (part.strip() for part in spec.partition(":"))
    if name not in RULES:
        msg = f"There is no rejection rule {name!r}. Choose one of {sorted(RULES)}."
        raise ValueError(msg)
    settings = fields(RULES[name])
    try:
        return RULES[name](**_parse_settings(text.split(",") if colon else [], settings, get_type_hints(RULES[name])))
    except ValueError as error:
        choices = ", ".join(f"{s.name}{'' if s.default is MISSING else f'={s.default}'}" for s in settings)
        msg = (
            f"Can't use {spec!r} as a rejection rule: {error} Settings of {name!r}, with defaults: {choices or 'none'}."
        )
        raise ValueError(msg) from error


def _parse_settings(items: list[str], settings: tuple[Field, ...], types: dict[str, Any]) -> dict[str, Any]:
    names = [setting.name for setting in settings]
    values: dict[str, Any] = {}
    for position, item in enumerate(items):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals and position == 0 and names:
            name, text = names[0], name
        elif not equals or name not in names or name in values:
            msg = f"expected name=value of one of its settings, each once, found {item.strip()!r}."
            raise ValueError(msg)
        try:
            values[name] = types[name](text)
        except ValueError:
            msg = f"{name} must be of type {types[name].__name__}, found {text!r}."
            raise ValueError(msg) from None
    missing = [s.name for s in settings if s.default is MISSING and s.name not in values]
    if missing:
        msg = f"it has no default for {missing[0]}; write {missing[0]}=value after the colon."
        raise ValueError(msg)
    return values


def _upper_component_from(standardised: np.ndarray) -> float:
    """Where the upper component of the mixture takes over (see `MixtureFence`), in the units of the sorted scores."""
    from sklearn.mixture import GaussianMixture

    column, count = standardised[:, None], len(standardised)
    one = GaussianMixture(1, covariance_type="diag", reg_covar=_MIXTURE_VARIANCE).fit(column)
    two = None
    for share in _MIXTURE_STARTS:
        upper = max(1, round(share * count))
        halves = standardised[:-upper], standardised[-upper:]
        candidate = GaussianMixture(
            2,
            covariance_type="diag",
            reg_covar=_MIXTURE_VARIANCE,
            max_iter=1000,
            weights_init=[len(half) / count for half in halves],
            means_init=[[half.mean()] for half in halves],
            precisions_init=[[1 / (half.var() + _MIXTURE_VARIANCE)] for half in halves],
        ).fit(column)
        # A margin: rounding must not choose between two optima of the same likelihood.
        if two is None or candidate.lower_bound_ > two.lower_bound_ + 1e-6:
            two = candidate
    if two.bic(column) >= one.bic(column):
        return float("inf")
    order = np.argsort(two.means_[:, 0])
    (w1, w2), (m1, m2), (v1, v2) = two.weights_[order], two.means_[order, 0], two.covariances_[order, 0]
    # Logarithm of the ratio of upper to lower component, a polynomial of the score.
    log_odds = np.poly1d(
        [
            (1 / v1 - 1 / v2) / 2,
            m2 / v2 - m1 / v1,
            math.log(w2 / w1) + math.log(v1 / v2) / 2 + (m1**2 / v1 - m2**2 / v2) / 2,
        ]
    )
    if log_odds(m1) >= 0:
        return float("inf")
    roots = log_odds.roots
    return float(min((root.real for root in roots if np.isreal(root) and root.real > m1), default=np.inf))


def _fence_below_highest(scores: np.ndarray, count: int) -> float:
    """The fence that rejects the ``count`` highest scores, fewer where a tie lies across it."""
    ordered = np.sort(scores)
    fence = float(ordered[len(ordered) - 1 - count])
    return fence if fence < ordered[-1] else float("inf")


def _check_positive(rule: Rule, setting: str) -> None:
    value = getattr(rule, setting)
    _check(rule, setting, 0 < value < math.inf, "a finite number above 0")


def _check(rule: Rule, setting: str, valid: bool, expected: str) -> None:
    if not valid:
        msg = f"{setting} of {type(rule).__name__} must be {expected}, found {getattr(rule, setting)}."
        raise ValueError(msg)
