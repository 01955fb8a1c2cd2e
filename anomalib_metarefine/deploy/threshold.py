"""A decision threshold from images taken as normal: no defects, no F1, a stated false-alarm rate.

With enough images the threshold is one of their scores: the share of all normal images that score above the r-th
smallest of n follows a beta distribution whatever the distribution of the scores, so for each n and each confidence one
knows how far down one may go (`order statistic`). With fewer, ``Q3 + factor * IQR`` takes its place, with the factor
that an exponential-like tail, fitted to the scores between the median and the 85th percentile, needs for the rate
(`iqr`). What the n images can promise without believing in that tail is stated in either case: ``bound``.

A few defective images among them would take the place of the highest normal ones and push either kind of threshold up.
Scores far beyond the fitted tail are therefore set aside, by the procedure of Benjamini and Hochberg. That would bias
the order statistic were they normal images after all: as many of them as the procedure expects to be wrong about, and
at least one, are counted as normal images above the threshold.

References:
    - Wilks, "Determination of Sample Sizes for Setting Tolerance Limits", 1941.
    - Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial", 1934.
    - Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995.
    - Pickands, "Statistical Inference Using Extreme Order Statistics", 1975 (the generalised Pareto tail).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import bdtr, betaincinv

FEWEST_SCORES = 20  # below, the tail's scale would come from six scores or fewer
_CENSORED = 0.15  # highest share of the scores that the tail is fitted without, as defects may be among them
_HEAVIER = 0.05  # shape of the tail beyond what its estimated scale asks for; chosen on ELPV mono (docs/threshold.md)
_WRONG = 0.1  # expected share of normal images among those set aside
_MOST_ASIDE = 0.25  # past it these are not a few defects, and the median may be defective
_FARTHEST = 10.0  # distances of the threshold from the median: a score further out does not stretch the normalisation


@dataclass(frozen=True)
class Uncertain:
    """Scores between which a person should look.

    Attributes:
        lower (float): Raw score from which on an image is uncertain.
        upper (float): Raw score up to which it is: a tenth of the threshold's false alarms are expected beyond.
        expected_share (float): Share of the normal images that is expected in between.
    """

    lower: float
    upper: float
    expected_share: float


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it promises.

    Attributes:
        threshold (float): Raw. An image above it is anomalous.
        false_alarm_rate (float): Share of normal images above the threshold that was asked for.
        confidence (float): That of the bound.
        bound (float): The smallest rate that the images can promise at this threshold with this confidence, whatever
            the distribution of the scores. At most `false_alarm_rate` if the method is ``"order statistic"``.
        images (int): Scores given, and images left out before.
        set_aside (int): How many of them were taken for defective.
        method (Literal["order statistic", "iqr"]): Which threshold it is.
        factor (float): Inter-quartile ranges from the upper quartile to the threshold.
        uncertain (Uncertain): The reject option.
        minimum (float): Raw score that becomes 0 in [0, 1]; normal images lie well above it.
        maximum (float): Raw score that becomes 1; the threshold is half way.
        quantiles (tuple[float, ...]): 0, 0.01, ..., 1 of the scores that were not set aside.
    """

    threshold: float
    false_alarm_rate: float
    confidence: float
    bound: float
    images: int
    set_aside: int
    method: Literal["order statistic", "iqr"]
    factor: float
    uncertain: Uncertain
    minimum: float
    maximum: float
    quantiles: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The entry ``calibration`` of ``metadata.json``."""
        names = ("false_alarm_rate", "confidence", "bound", "images", "set_aside", "method", "factor")
        uncertain = {name: getattr(self.uncertain, name) for name in ("lower", "upper", "expected_share")}
        entry = {name: getattr(self, name) for name in names}
        return {**entry, "uncertain": uncertain, "quantiles": list(self.quantiles)}


def calibrate(
    scores: np.ndarray,
    false_alarm_rate: float = 0.01,
    confidence: float = 0.95,
    uncertain_share: float = 0.02,
    left_out: int = 0,
) -> Calibration:
    """Choose the threshold.

    Args:
        scores (np.ndarray): ``[N]`` raw image scores, at least 20, of images taken as normal; up to a tenth may be
            defective. The model must not have seen the images, or must have scored each as if it had not (leave one
            out): scores of training images are too low.
        false_alarm_rate (float): Largest share of normal images above the threshold, in (0, 0.5).
        confidence (float): Probability, over the images drawn, that the promise is kept, in [0.5, 1).
        uncertain_share (float): Share of normal images that a person may be asked about, in (0, 0.5).
        left_out (int): Images that were taken for defective before, and whose scores are not given. They count as set
            aside, and a tenth of them as normal images above the threshold.

    Returns:
        Calibration: Invariant to the order of the scores; moves with a shift and a positive scale of them.

    Raises:
        ValueError: If there are too few scores, some are not finite, or so many are equal that there is no spread (of
            equal scores no threshold says anything about the next image: one model or one image too often), or if a
            setting is out of range.

    Example:
        >>> scores = np.random.default_rng(0).normal(2, 0.5, 500)
        >>> found = calibrate(scores)
        >>> found.method, found.bound <= 0.01, found.set_aside
        ('order statistic', True, 0)
        >>> round(calibrate(scores[:50]).bound, 3)  # all that 50 images can promise
        0.058
    """
    check_settings(false_alarm_rate, confidence, uncertain_share)
    ordered = np.sort(_checked_scores(scores))
    kept = ordered[: len(ordered) - _count_defective(ordered, _Tail.fit(ordered))]
    aside = len(ordered) - len(kept) + left_out
    tail = _Tail.fit(kept)
    doubtful = math.ceil(_WRONG * aside)
    normal = len(kept) + doubtful
    above = most_above(normal, false_alarm_rate, confidence)
    if above >= doubtful:
        method: Literal["order statistic", "iqr"] = "order statistic"
        threshold = float(kept[len(kept) - 1 - (above - doubtful)])
        expected = (above + 1) / (normal + 1)
    else:
        method = "iqr"
        threshold = max(tail.score(false_alarm_rate), float(kept[-1]))
        above = doubtful
        expected = tail.share(threshold)
    quantiles = np.quantile(kept, np.linspace(0, 1, 101))
    half = 2 * max(threshold - kept[0], min(ordered[-1] - threshold, _FARTHEST * (threshold - quantiles[50])))
    return Calibration(
        threshold=threshold,
        false_alarm_rate=false_alarm_rate,
        confidence=confidence,
        bound=rate_bound(above, normal, confidence),
        images=len(ordered) + left_out,
        set_aside=aside,
        method=method,
        factor=float((threshold - quantiles[75]) / (quantiles[75] - quantiles[25])),
        uncertain=_uncertain(kept, doubtful, tail, threshold, expected, uncertain_share),
        minimum=float(threshold - half),
        maximum=float(threshold + half),
        quantiles=tuple(quantiles.tolist()),
    )


def most_above(images: int, rate: float, confidence: float) -> int:
    """How many of the images may score above a threshold that promises a rate with a confidence; -1 if none may.

    With at most that many above, the true rate exceeds ``rate`` with a probability of ``1 - confidence`` at most. No
    threshold can promise it, not even the highest score, with fewer than ``log(1 - confidence) / log(1 - rate)``.

    Example:
        >>> [most_above(images, 0.01, 0.95) for images in (298, 299, 473)]
        [-1, 0, 1]
    """
    # The expected number is past the answer for every confidence above one half, and near enough at it.
    counts = np.arange(min(images, math.ceil(images * rate) + 1) + 1)
    return int((bdtr(counts, images, rate) <= 1 - confidence).sum()) - 1


def rate_bound(above: int, images: int, confidence: float) -> float:
    """Upper confidence limit of the rate, if ``above`` of the images are above the threshold (Clopper and Pearson)."""
    return float(betaincinv(above + 1, images - above, confidence))


class _Tail(NamedTuple):
    """Generalised Pareto tail above the median.

    Attributes:
        start (float): The median.
        scale (float): In units of the score, above 0.
        shape (float): Above 0; how much heavier than exponential.
    """

    start: float
    scale: float
    shape: float

    @classmethod
    def fit(cls, ordered: np.ndarray) -> _Tail:
        """Fit to sorted scores between the median and the 85th percentile; of those above only their number counts.

        The scale is the maximum-likelihood one of an exponential distribution censored there. As m scores have told
        it, the next score follows, for all they know, a Pareto distribution of shape 1 / m.
        """
        start = float(np.median(ordered))
        last = math.ceil((1 - _CENSORED) * len(ordered))
        seen = ordered[len(ordered) - len(ordered) // 2 : last] - start
        total = seen.sum() + (len(ordered) - last) * (ordered[last - 1] - start)
        if not total > 0:
            msg = (
                f"{int((ordered == start).sum())} of {len(ordered)} scores are {start:.6g}: no threshold can be chosen "
                "from scores without spread. Are these copies of one image, or is the model constant?"
            )
            raise ValueError(msg)
        return cls(start, float(total / len(seen)), _HEAVIER + 1 / len(seen))

    def share(self, score: float | np.ndarray) -> Any:  # noqa: ANN401
        """Share of normal images above a score."""
        distance = np.maximum(score - self.start, 0) / self.scale
        return 0.5 * (1 + self.shape * distance) ** (-1 / self.shape)

    def score(self, share: float) -> float:
        """The score that a share below one half lies above."""
        return self.start + self.scale / self.shape * ((share / 0.5) ** -self.shape - 1)


def _count_defective(ordered: np.ndarray, tail: _Tail) -> int:
    """How many of the highest scores are no normal images', by the fitted tail."""
    count = len(ordered)
    most = math.floor(_MOST_ASIDE * count)
    ranks = np.arange(1, most + 1)
    passed = np.flatnonzero(tail.share(ordered[::-1][:most]) <= _WRONG * ranks / count)
    if not len(passed):
        return 0
    aside = int(passed[-1]) + 1
    # Equal scores are all of one kind.
    while aside and ordered[count - aside] == ordered[count - aside - 1]:
        aside -= 1
    return aside


def _uncertain(
    kept: np.ndarray, doubtful: int, tail: _Tail, threshold: float, expected: float, share: float
) -> Uncertain:
    """The narrowest band around the threshold that begins at a kept score and has at least ``share`` in it.

    Args:
        kept (np.ndarray): ``[K]``, sorted.
        doubtful (int): Images above all of these that count as normal.
        tail (_Tail): Of the kept scores.
        threshold (float): Raw.
        expected (float): Expected share of normal images above it.
        share (float): Wanted in the band.
    """
    normal = len(kept) + doubtful
    beyond = expected / 10
    # The k-th highest score has an expected share of k / (n + 1) above it.
    rank = math.ceil(round((share + beyond) * (normal + 1), 9))
    below = int(np.searchsorted(kept, threshold))  # kept scores below the threshold, of which there are some
    position = min(max(normal - rank, 0), max(below - 1, 0), len(kept) - 1)
    local = tail.scale + tail.shape * max(threshold - tail.start, 0)
    upper = threshold + local / tail.shape * (10**tail.shape - 1)
    return Uncertain(float(kept[position]), float(upper), float((normal - position) / (normal + 1) - beyond))


def _checked_scores(scores: np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or len(values) < FEWEST_SCORES:
        msg = (
            f"Calibration needs a list of {FEWEST_SCORES} scores of normal images or more, found shape {values.shape}."
        )
        raise ValueError(msg)
    if not np.isfinite(values).all():
        found = int((~np.isfinite(values)).sum())
        msg = f"{found} of {len(values)} scores are not finite. Find out which images these are."
        raise ValueError(msg)
    lower, upper = np.quantile(values, [0.25, 0.75])
    if lower == upper:
        msg = (
            f"Half of the {len(values)} scores are {lower:.6g}: no threshold can be chosen from scores without spread. "
            "Are these copies of one image, or is the model constant?"
        )
        raise ValueError(msg)
    return values


def check_settings(false_alarm_rate: float, confidence: float, uncertain_share: float = 0.02) -> None:
    """Refuse settings of `calibrate` that are out of range, before images are scored for them.

    Raises:
        ValueError: If one is.
    """
    for name, value in {"false_alarm_rate": false_alarm_rate, "uncertain_share": uncertain_share}.items():
        if not 0 < value < 0.5:
            msg = f"{name} must be a share above 0 and below 0.5, found {value}."
            raise ValueError(msg)
    if not 0.5 <= confidence < 1:
        msg = f"confidence must be at least 0.5 and below 1, found {confidence}."
        raise ValueError(msg)
