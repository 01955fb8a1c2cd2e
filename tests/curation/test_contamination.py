import numpy as np
import pytest
from scipy.stats import exponnorm

from anomalib_metarefine.curation import contamination
from anomalib_metarefine.curation.contamination import estimate_contamination
from anomalib_metarefine.curation.rules import PosteriorFence


def mixture(dirty: int, clean: int = 300, shift: float = 7.0, seed: int = 0) -> np.ndarray:
    """Clean scores first; dirty ones ``shift`` standard deviations up."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, 1, clean), rng.normal(shift, 1, dirty)])


@pytest.mark.parametrize("dirty", [15, 60, 200])
def test_finds_the_share_of_what_stands_apart(dirty):
    scores = mixture(dirty)
    found = estimate_contamination(scores)
    low, high = found.interval()
    share = dirty / len(scores)
    assert low <= share <= high
    # How many hide among the clean ones nobody can tell, but that these are dirty is plain.
    assert low == pytest.approx(share, abs=0.05)
    assert (found.dirty_probability[-dirty:] > 0.8).mean() > 0.9
    assert (found.dirty_probability[:300] > 0.5).mean() < 0.03


def test_a_clean_set_may_be_clean():
    for seed in range(3):
        found = estimate_contamination(mixture(0, seed=seed))
        low, _ = found.interval()
        assert low < 0.005
        assert found.estimate < 0.1
        assert (found.dirty_probability < 0.5).all()


def test_overlap_widens_the_interval_and_raises_the_doubt():
    apart, mixed = estimate_contamination(mixture(75, shift=9)), estimate_contamination(mixture(75, shift=2))
    assert mixed.doubt > 3 * apart.doubt
    assert mixed.interval()[0] < apart.interval()[0]


def test_order_shift_and_scale_do_not_matter():
    scores = np.round(mixture(30) * 64)
    found = estimate_contamination(scores)
    order = np.random.default_rng(1).permutation(len(scores))
    shuffled = estimate_contamination(scores[order])
    np.testing.assert_array_equal(shuffled.shares, found.shares)
    np.testing.assert_array_equal(shuffled.dirty_probability, found.dirty_probability[order])
    np.testing.assert_array_equal(estimate_contamination(4 * scores + 1024).shares, found.shares)


def test_a_higher_score_is_never_less_suspicious():
    scores = np.append(mixture(30), [1e3, 1e9])
    probability = estimate_contamination(scores).dirty_probability
    assert (np.diff(probability[np.argsort(scores)]) >= 0).all()


@pytest.mark.parametrize("scores", [np.zeros(50), np.arange(9.0), np.array([3.0])])
def test_too_little_to_tell(scores):
    found = estimate_contamination(scores)
    assert found.interval() == pytest.approx((0, 0.5), abs=0.03)
    assert (found.dirty_probability <= 0.25).all()
    assert PosteriorFence().fence(scores) == np.inf


def test_many_scores_are_thinned_and_all_get_a_probability():
    scores = mixture(1_000, clean=9_000)
    found = estimate_contamination(scores)
    assert found.interval()[0] == pytest.approx(0.1, abs=0.03)
    assert (found.dirty_probability[-1_000:] > 0.5).mean() > 0.95


def test_an_interval_grows_with_its_level():
    found = estimate_contamination(mixture(30))
    widths = [np.diff(found.interval(level))[0] for level in (0.5, 0.9, 0.99)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_the_density_is_that_of_scipy():
    x = np.linspace(-5, 30, 50)
    ours = contamination._log_exponnorm(x, 0.5, 1.5, 3.0)
    np.testing.assert_allclose(ours, exponnorm(K=2.0, loc=0.5, scale=1.5).logpdf(x), rtol=1e-9)


@pytest.mark.parametrize("level", [0.05, 0.15])
def test_the_fence_keeps_to_its_level(level):
    """Clean images among those rejected: at most about the level, where the scores are as the model has them."""
    wrong = rejected = 0
    for seed in range(4):
        scores = mixture(60, shift=3.5, seed=seed)
        outside = scores > PosteriorFence(level).fence(scores)
        wrong, rejected = wrong + outside[:300].sum(), rejected + outside.sum()
    assert rejected > 100
    assert wrong / rejected < 1.5 * level
