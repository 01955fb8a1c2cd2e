import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from anomalib_metarefine.deploy.bets import Bets

QUANTILES = np.linspace(0, 1, 101)  # of uniform scores


@given(chance=st.floats(0.01, 0.94), odds=st.sampled_from([1.5, 2.5, 5.0]), learned=st.integers(0, 500))
def test_bets_are_fair_at_the_chance_that_they_are_of(chance, odds, learned):
    past = 300 * chance / 2
    bets = Bets(*(np.array([value]) for value in (0.5, True, odds, chance, 301.0)))
    win, lose = (float(bets.gains(np.array([won]), learned, np.array([past]))[0]) for won in (True, False))
    fair = (301 * chance + past) / (301 + learned)  # Polya's urn
    if fair < 1:
        assert fair * math.exp(win) + (1 - fair) * math.exp(lose) == pytest.approx(1)
        assert lose < 0 < win


@pytest.mark.parametrize("images", [20, 101, 350])
def test_chances_hold_for_the_quantiles_of_a_sample(images):
    rng = np.random.default_rng(images)
    bets = Bets.make(QUANTILES, images, 0.2, 0.0)
    level = np.round(bets.quantile * 100).astype(int)
    reached = np.quantile(rng.uniform(size=(4000, images)), QUANTILES, axis=1).T[:, level]
    past = np.where(bets.upward, 1 - reached, reached)  # true share of uniform scores past the quantiles
    anchored = np.isinf(bets.weight)
    assert (past <= bets.chance)[:, anchored].mean(0).min() >= 1 - 0.02 - 0.01
    mean = past.mean(0)[~anchored]
    assert (mean <= bets.chance[~anchored] + 0.003).all()
    assert (mean >= bets.chance[~anchored] - 1 / (images + 1) - 0.003).all()


def test_anchored_chance_is_the_beta_limit():
    bets = Bets.make(QUANTILES, 301, 0.1, 0.0)
    chosen = bets.upward & (bets.quantile == 0.5) & np.isinf(bets.weight)
    # Of 301 scores the median is the 151st from above.
    assert bets.chance[chosen] == pytest.approx(beta.ppf(0.99, 151, 151))
