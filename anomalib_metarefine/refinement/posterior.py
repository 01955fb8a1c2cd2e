"""How many images are dirty: a posterior of the contamination, from scores alone, with its uncertainty.

The scores of a training set are described as a mixture. Clean images: a normal distribution plus an exponential one
(right-skewed, as clean scores are); a few odd but clean images far out; dirty images: the same form, shifted up by an
unknown amount and with a longer tail; and beside them an unknown share of dirty images that score like clean ones, so
that a lower bound of the contamination is known far better than an upper one. Where clean and dirty overlap, many
combinations explain the scores about as well, and that is the answer then: Markov chain Monte Carlo draws from all of
them, in proportion to how well they do. Every draw has a contamination, and a probability for each image to be dirty.

Where a person has looked at some of the images, their answers count too: shapes and shares that make them unlikely are
drawn rarely, and how many dirty images hide among those that score like clean ones is no longer a matter of belief.

The idea of a distribution of the contamination factor rather than one number is that of Perini et al., who draw from a
Dirichlet-process mixture in the space of several detectors' scores. Here there is one score whose shape on clean images
is known to some degree, so a small parametric mixture serves, and says more from 100 scores.

References:
    - Perini et al., "Estimating the Contamination Factor's Distribution in Unsupervised Anomaly Detection", ICML 2023,
      arXiv 2210.10487.
    - Foreman-Mackey et al., "emcee: The MCMC Hammer", arXiv 1202.3665.
    - ter Braak and Vrugt, "Differential Evolution Markov Chain with snooker updater and fewer chains", 2008.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import expit, log_ndtr, logsumexp

from anomalib_metarefine.robust import evenly_spaced, lower_side_scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FURTHER_SCALES = ("combined", "resembling")  # parts of the score that are scales of their own
_LIMITS = (-6.0, 60.0)  # spreads: how far out an outlier lies carries no more information past them
_MOST_SCORES = 1_000  # evenly spaced order statistics of more say about the same
_FEWEST_SCORES = 10  # there is nothing to estimate a mixture from
_WALKERS, _STEPS, _WARM_UP, _THINNING = 48, 900, 500, 10

# Priors, in the spreads of the scores; chosen on ELPV mono (docs/results.md).
_CENTRE_PRIOR = (-0.2, 0.4)  # of the clean scores: mean and standard deviation
_SPREAD_PRIOR = 0.5  # standard deviation of the logarithm
_SKEW_PRIOR = (np.log(0.4), 0.7)  # logarithm of the exponential part's mean: mean and standard deviation
_SHIFT_PRIOR = 2.0  # mean of a dirty image's shift, exponential
_TAIL_PRIOR = (np.log(3.0), 0.8)  # logarithm of the dirty tail's extra mean
_ODD_PRIOR = 0.04  # mean share of odd clean images, exponential
_MOST = 0.5  # past it "normal" would no longer mean the majority
_SHARE_PRIOR = (0.3, 3.0)  # Beta, of the visible share over `_MOST`: most sets hold few dirty images
_MOST_HIDDEN = 0.9  # of the dirty images, look like clean ones: anything up to it is as likely
# What a person's answers are weighed against: shares of the dirty images that look like clean ones, and how fast such
# images thin out from the highest of the clean scores to the lowest, in factors of e. All pairs of them, [H].
_HIDDEN, _THINNING_OUT = (grid.ravel() for grid in np.meshgrid([0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9], [1e-6, 3, 6, 12]))
_SLIP = 0.02  # probability of a wrong answer: one slip of a person must not overturn what all the scores say
_MOST_ANSWERS = 200  # evenly spaced by score, while drawing; all of them count as known
_FARTHEST = 5.0  # of centre and logarithms from zero: far past what the priors like, and far from overflow
_LEVEL = 0.9  # of the interval that is shown
_MOST_DOUBT = 0.35  # expected wrong decisions per expected dirty image, past which there is no visible split
_MODEL_DOUBT = 0.5  # part of the probability outside an interval that is left outside: the model is not the truth


@dataclass(frozen=True)
class Contamination:
    """Posterior of the share of dirty images and of every image's state.

    Attributes:
        shares (np.ndarray): Draws of the contamination, ``[S]``.
        dirty_probability (np.ndarray): ``[N]``, in the order of the scores given. Without answers, dirty images that
            score like clean ones are left out of it; with them it counts those too.
        answers (int): How many images a person has decided on.
    """

    shares: np.ndarray
    dirty_probability: np.ndarray
    answers: int = 0

    @property
    def estimate(self) -> float:
        """Posterior median."""
        return float(np.median(self.shares))

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """The contamination, with a probability of about ``level``.

        The shortest interval that holds more of the posterior than that, (1 + level) / 2: real scores follow no simple
        mixture, and with ``level`` itself the truth was covered too rarely (docs/results.md).
        """
        ordered = np.sort(self.shares)
        inside = int(np.ceil((1 - _MODEL_DOUBT * (1 - level)) * len(ordered)))
        start = int(np.argmin(ordered[inside - 1 :] - ordered[: len(ordered) - inside + 1]))
        return float(ordered[start]), float(ordered[start + inside - 1])

    @cached_property
    def doubt(self) -> float:
        """Expected share of wrong decisions, if every image went to its more probable side."""
        return float(np.minimum(self.dirty_probability, 1 - self.dirty_probability).mean())

    def summary(self) -> dict[str, float | bool | int]:
        """What a manifest's ``run["contamination"]`` holds."""
        low, high = self.interval(_LEVEL)
        return {
            "estimate": self.estimate,
            "low": low,
            "high": high,
            "level": _LEVEL,
            "visible_split": self.doubt <= _MOST_DOUBT * self.estimate,
            "answers": self.answers,
        }


class _Answers(NamedTuple):
    """Images that a person looked at, ``[L]``: score in spreads, share of scores above it, whether it is dirty."""

    u: np.ndarray
    above: np.ndarray
    dirty: np.ndarray


def further_scales(parts: Mapping[str, Sequence[float]]) -> list[np.ndarray]:
    """Those parts of the score that are scales of their own, ``[N]`` each: what rule `auto` and the estimate look at.

    Args:
        parts (Mapping[str, Sequence[float]]): The parts by name, see `FURTHER_SCALES`.
    """
    return [np.asarray(parts[name]) for name in FURTHER_SCALES if name in parts]


def estimate_contamination(
    scores: np.ndarray, seed: int = 0, known: Mapping[int, bool] | None = None, further: Sequence[np.ndarray] = ()
) -> Contamination:
    """Posterior of the contamination, invariant to order, shift and scale of the scores.

    Args:
        scores (np.ndarray): ``[N]``, finite, higher is more anomalous.
        seed (int): Of the Markov chains.
        known (Mapping[int, bool] | None): Images, by their place in ``scores``, that a person has decided to keep
            (true) or to reject.
        further (Sequence[np.ndarray]): The same images' scores on other scales, ``[N]`` each, e.g. with likeness added.
            Which of them a mixture describes best nobody knows, so all count alike: their draws are taken together.
            That an image is dirty may show on any, so its probability is the highest one.

    Returns:
        Contamination: With fewer than ten scores, or without any spread, somewhere between 0 and one half of the images
            that nobody decided on. An image that somebody decided on has probability 0 or 1.
    """
    known = known or {}
    if further:
        each = [estimate_contamination(scale, seed, known) for scale in (scores, *further)]
        probability = np.max([one.dirty_probability for one in each], axis=0)
        return Contamination(np.concatenate([one.shares for one in each]), probability, len(known))
    places = np.fromiter(known, int, len(known))
    dirty = ~np.fromiter(known.values(), bool, len(known))
    centre, spread = lower_side_scale(scores)
    if len(scores) < _FEWEST_SCORES or spread <= 0:
        shares = (dirty.sum() + np.linspace(0, _MOST, 1001) * (len(scores) - len(known))) / len(scores)
        probability = np.full(len(scores), _MOST / 2)
    else:
        u = ((scores - centre) / spread).clip(*_LIMITS)
        shares, probability = _posterior(u, places, dirty, seed)
    probability[places] = dirty
    return Contamination(shares, probability, len(known))


def _posterior(u: np.ndarray, places: np.ndarray, dirty: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the contamination ``[S]``, and the probability of every score to be a dirty image's, ``[N]``."""
    ordered = np.sort(u)
    above = 1 - ordered.searchsorted(u, side="right") / len(u)
    by_score = places[np.argsort(u[places], kind="stable")][evenly_spaced(len(places), _MOST_ANSWERS)]
    answers = _Answers(u[by_score], above[by_score], np.isin(by_score, places[dirty]))
    chain = _draw(ordered[evenly_spaced(len(u), _MOST_SCORES)], answers, seed)
    generator = np.random.default_rng(seed)
    pair = _draw_pair(chain, answers, generator)[:, None] if len(places) else None
    undecided = np.ones(len(u), dtype=bool)
    undecided[places] = False
    probability, count = np.zeros(len(u)), np.full(len(chain), float(dirty.sum()))
    for part in np.array_split(np.arange(len(u)), max(1, len(u) // _MOST_SCORES)):
        clean, visible = _log_densities(chain, u[None, part])
        each = expit(visible - clean)
        if pair is not None:
            each += (1 - each) * _dirty_though_it_looks_clean(
                chain[:, [_SHARE]], _HIDDEN[pair], _THINNING_OUT[pair], above[part]
            )
        probability[part] = each.mean(0)
        count += each[:, undecided[part]].sum(1)
    # A tail that falls faster than that of the odd clean images would make the farthest look cleaner: not so.
    order = np.argsort(u, kind="stable")
    probability[order] = np.maximum.accumulate(probability[order])
    if pair is not None:
        return count / len(u), probability
    # The visible share says nothing about the dirty images that look like clean ones: that is the prior's.
    hidden = generator.uniform(0, _MOST_HIDDEN, len(chain))
    return np.minimum(chain[:, _SHARE] / (1 - hidden), _MOST), probability


# Columns of the chain.
_CENTRE, _LOG_SPREAD, _LOG_SKEW, _DIRTY_SHIFT, _LOG_TAIL, _SHARE, _ODD_SHARE = range(7)


def _draw(u: np.ndarray, answers: _Answers, seed: int) -> np.ndarray:
    """Draws ``[S x 7]`` from the posterior given ``[N]`` sorted scores in spreads."""
    import emcee

    generator = np.random.default_rng(seed)
    start = np.column_stack([
        generator.normal(_CENTRE_PRIOR[0], 0.2, _WALKERS),
        generator.normal(0, 0.1, _WALKERS),
        generator.normal(_SKEW_PRIOR[0], 0.3, _WALKERS),
        generator.exponential(_SHIFT_PRIOR, _WALKERS) + 0.05,
        generator.normal(_TAIL_PRIOR[0], 0.4, _WALKERS),
        generator.uniform(0.01, 0.9 * _MOST, _WALKERS),
        generator.exponential(_ODD_PRIOR, _WALKERS).clip(1e-3, 0.1),
    ])  # fmt: skip
    moves = [(emcee.moves.DEMove(), 0.8), (emcee.moves.DESnookerMove(), 0.2)]
    sampler = emcee.EnsembleSampler(
        _WALKERS, start.shape[1], _log_posterior, args=[u, answers], vectorize=True, moves=moves
    )
    sampler.random_state = np.random.RandomState(seed).get_state()
    sampler.run_mcmc(start, _STEPS)
    return sampler.get_chain(discard=_WARM_UP, thin=_THINNING, flat=True)


def _log_posterior(chain: np.ndarray, u: np.ndarray, answers: _Answers) -> np.ndarray:
    """Unnormalised, ``[S]``, of draws ``[S x 7]``."""
    allowed = (
        (np.abs(chain[:, [_CENTRE, _LOG_SPREAD, _LOG_SKEW, _LOG_TAIL]]) < _FARTHEST).all(1)
        & (chain[:, _DIRTY_SHIFT] > 0)
        & (chain[:, _SHARE] > 0)
        & (chain[:, _SHARE] < _MOST)
        & (chain[:, _ODD_SHARE] > 0)
        & (chain[:, _ODD_SHARE] < 0.2)
    )
    result = np.full(len(chain), -np.inf)
    if allowed.any():
        inside = chain[allowed]
        clean, dirty = _log_densities(inside, u[None])
        result[allowed] = np.logaddexp(clean, dirty).sum(1) + _log_prior(inside)
        if len(answers.u):
            result[allowed] += logsumexp(_log_likelihood(inside, answers), axis=1)
    return result


def _log_likelihood(chain: np.ndarray, answers: _Answers) -> np.ndarray:
    """Of the answers given the scores, ``[S x H]``, for every pair of `_HIDDEN` and `_THINNING_OUT`."""
    clean, visible = _log_densities(chain, answers.u[None])
    visible = expit(visible - clean)[:, None]  # [S x 1 x L]
    looks_clean = _dirty_though_it_looks_clean(
        chain[:, _SHARE, None, None], _HIDDEN[:, None], _THINNING_OUT[:, None], answers.above
    )
    probability = _SLIP + (1 - 2 * _SLIP) * (visible + (1 - visible) * looks_clean)
    return np.log(np.where(answers.dirty, probability, 1 - probability)).sum(2)


def _draw_pair(chain: np.ndarray, answers: _Answers, generator: np.random.Generator) -> np.ndarray:
    """One pair of `_HIDDEN` and `_THINNING_OUT` for every draw, ``[S]``, in proportion to how well it fits."""
    fit = _log_likelihood(chain, answers)
    cumulative = np.exp(fit - logsumexp(fit, axis=1, keepdims=True)).cumsum(1)
    return (cumulative < generator.random((len(chain), 1))).sum(1).clip(max=len(_HIDDEN) - 1)


def _dirty_though_it_looks_clean(
    share: np.ndarray, hidden: np.ndarray, thinning_out: np.ndarray, above: np.ndarray
) -> np.ndarray:
    """Probability that an image is dirty if its score is one of the clean ones'; arguments broadcast.

    Args:
        share (np.ndarray): Visibly dirty images among all.
        hidden (np.ndarray): Dirty images that look clean, among the dirty ones.
        thinning_out (np.ndarray): From the highest of the clean scores to the lowest, in factors of e.
        above (np.ndarray): Share of the scores above the image's.
    """
    among_clean = (np.minimum(share / (1 - hidden), _MOST) - share) / (1 - share)
    highest = np.minimum(among_clean * thinning_out / -np.expm1(-thinning_out), 1)
    depth = ((above - share) / (1 - share)).clip(0, 1)
    return highest * np.exp(-thinning_out * depth)


def _log_prior(chain: np.ndarray) -> np.ndarray:
    centre, log_spread, log_skew, shift, log_tail, share, odd = chain.T
    few, many = _SHARE_PRIOR
    return (
        -0.5 * ((centre - _CENTRE_PRIOR[0]) / _CENTRE_PRIOR[1]) ** 2
        - 0.5 * (log_spread / _SPREAD_PRIOR) ** 2
        - 0.5 * ((log_skew - _SKEW_PRIOR[0]) / _SKEW_PRIOR[1]) ** 2
        - 0.5 * ((log_tail - _TAIL_PRIOR[0]) / _TAIL_PRIOR[1]) ** 2
        - shift / _SHIFT_PRIOR
        - odd / _ODD_PRIOR
        + (few - 1) * np.log(share)
        + (many - 1) * np.log1p(-share / _MOST)
    )


def _log_densities(chain: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of share times density of clean (odd ones included) and of dirty images, ``[S x N]`` each."""
    centre, log_spread, log_skew, shift, log_tail, share, odd = (column[:, None] for column in chain.T)
    spread = np.exp(log_spread)
    skew = spread * np.exp(log_skew)
    usual = np.log1p(-odd) + _log_exponnorm(u, centre, spread, skew)
    strange = np.log(odd) + _log_exponnorm(u, centre + 2 * spread, spread, 6 * spread)
    dirty = _log_exponnorm(u, centre + shift * spread, spread, skew + spread * np.exp(log_tail))
    return np.log1p(-share) + np.logaddexp(usual, strange), np.log(share) + dirty


def _log_exponnorm(x: np.ndarray, mean: np.ndarray, deviation: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Log density of a normal variable plus an exponential one of mean ``tail``.

    As `scipy.stats.exponnorm.logpdf`, which checks its arguments at ten times the cost.
    """
    ratio = deviation / tail
    z = (x - mean) / deviation
    return -np.log(tail) + ratio * (0.5 * ratio - z) + log_ndtr(z - ratio)
