import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import beta, binom

from anomalib_metarefine.deploy.threshold import FEWEST_SCORES, calibrate, most_above, rate_bound

few_examples = settings(max_examples=40, deadline=None)
# Whole numbers: shift and scale are then exact. Distinct ones: there is always a spread.
scores = arrays(
    np.float64, st.integers(FEWEST_SCORES, 400), elements=st.integers(-5000, 5000).map(float), unique=True
)  # fmt: skip


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Skewed, as image scores are."""
    return np.random.default_rng(seed).gamma(3, 0.4, count)


@few_examples
@given(values=scores, random=st.randoms())
def test_order_does_not_matter(values, random):
    shuffled = values.copy()
    random.shuffle(shuffled)
    assert calibrate(shuffled) == calibrate(values)


@few_examples
@given(values=scores, shift=st.integers(-100, 100), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_moves_with_shift_and_scale(values, shift, scale):
    before, after = calibrate(values, 0.02), calibrate(scale * values + shift, 0.02)
    for name in ("threshold", "minimum", "maximum"):
        assert getattr(after, name) == pytest.approx(scale * getattr(before, name) + shift, rel=1e-9, abs=1e-6)
    for name in ("lower", "upper"):
        moved = scale * getattr(before.uncertain, name) + shift
        assert getattr(after.uncertain, name) == pytest.approx(moved, rel=1e-9, abs=1e-6)
    assert (after.bound, after.set_aside, after.method) == (before.bound, before.set_aside, before.method)


@few_examples
@given(values=scores, rate=st.floats(0.001, 0.3), confidence=st.floats(0.5, 0.99), share=st.floats(0.001, 0.3))
def test_what_is_stated_agrees_with_itself(values, rate, confidence, share):
    found = calibrate(values, rate, confidence, share)
    assert (found.bound <= rate * (1 + 1e-6)) == (found.method == "order statistic")
    assert found.images == len(values)
    assert 0 <= found.set_aside <= len(values) / 4
    assert found.uncertain.lower <= found.threshold < found.uncertain.upper
    assert 0 < found.uncertain.expected_share < 1
    # Normal images keep clear of both ends, and normalised 0.5 is the threshold.
    kept = np.sort(values)[: len(values) - found.set_aside]
    normalised = (kept - found.minimum) / (found.maximum - found.minimum)
    assert normalised.min() >= 0.25 - 1e-9
    assert normalised.max() <= 0.75 + 1e-9
    assert found.minimum + found.maximum == pytest.approx(2 * found.threshold, abs=1e-6)
    assert np.array_equal(found.quantiles, np.quantile(kept, np.linspace(0, 1, 101)))
    lower, upper = np.quantile(kept, [0.25, 0.75])
    assert upper + found.factor * (upper - lower) == pytest.approx(found.threshold)


@few_examples
@given(values=scores, lower=st.floats(0.001, 0.2), upper=st.floats(0.001, 0.2))
def test_a_lower_rate_never_lowers_the_threshold(values, lower, upper):
    lower, upper = sorted([lower, upper])
    assert calibrate(values, lower).threshold >= calibrate(values, upper).threshold


@given(images=st.integers(1, 3000), rate=st.floats(0.001, 0.49), confidence=st.floats(0.51, 0.999))
def test_tolerance_limit_is_the_largest_that_keeps_the_promise(images, rate, confidence):
    above = most_above(images, rate, confidence)
    assert above >= -1
    assert above < 0 or binom.cdf(above, images, rate) <= 1 - confidence
    assert binom.cdf(above + 1, images, rate) > 1 - confidence
    # Wilks' formula says the same for the highest score.
    if abs(images - np.log(1 - confidence) / np.log(1 - rate)) > 1e-6:
        assert (above >= 0) == (images > np.log(1 - confidence) / np.log(1 - rate))


@given(images=st.integers(20, 3000), above=st.integers(0, 19), confidence=st.floats(0.5, 0.999))
def test_bound_is_the_rate_at_which_so_few_above_become_improbable(images, above, confidence):
    if above < images:
        assert binom.cdf(above, images, rate_bound(above, images, confidence)) == pytest.approx(1 - confidence)


@pytest.mark.parametrize(("images", "rate"), [(299, 0.01), (473, 0.01), (59, 0.05), (150, 0.05), (200, 0.1)])
def test_the_promise_is_kept_with_the_stated_confidence(images, rate):
    # Uniform scores: nothing is set aside (their tail is light), and the true rate is 1 - threshold.
    rng = np.random.default_rng(images)
    found = [calibrate(rng.uniform(size=images), rate) for _ in range(300)]
    assert all(c.method == "order statistic" for c in found)
    kept = np.mean([1 - c.threshold <= rate for c in found])
    above = most_above(images, rate, 0.95)
    exact = beta.cdf(rate, above + 1, images - above)
    assert exact >= 0.95
    assert kept == pytest.approx(exact, abs=0.035)


@pytest.mark.parametrize("count", [25, 60, 150])
def test_few_images_get_an_extrapolated_threshold_and_an_honest_bound(count):
    rates, bounds = [], []
    for seed in range(100):
        found = calibrate(drawn(count, seed))
        assert found.method == "iqr"
        assert found.bound > 0.01
        rates.append((drawn(10_000, 10_000 + seed) > found.threshold).mean())
        bounds.append(found.bound)
    assert np.mean(rates) < 0.01
    assert np.mean(np.array(rates) <= bounds) >= 0.95


def test_fewer_images_promise_less():
    bounds = [calibrate(drawn(count)).bound for count in (20, 40, 80, 160, 298)]
    assert bounds == sorted(bounds, reverse=True)
    assert calibrate(drawn(299)).bound <= 0.01 < bounds[-1]


@pytest.mark.parametrize("count", [60, 150, 400])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_far_defects_are_set_aside_and_hardly_move_the_threshold(count, rate):
    rng = np.random.default_rng(count)
    for share in (0.02, 0.05, 0.1):
        dirty = round(share * count)
        clean = drawn(count, count)
        mixed = np.concatenate([clean[dirty:], rng.uniform(15, 60, dirty)])
        before, after = calibrate(clean, rate), calibrate(mixed, rate)
        assert after.set_aside == dirty
        lower, upper = np.quantile(clean, [0.25, 0.75])
        assert abs(after.threshold - before.threshold) < 1.5 * (upper - lower)
        assert after.threshold < 15


def test_a_score_far_out_does_not_stretch_the_normalisation():
    near, far = (calibrate(np.append(drawn(300), top)) for top in (40.0, 1e6))
    assert far.maximum - far.minimum == near.maximum - near.minimum


@pytest.mark.parametrize("count", [50, 300, 1000])
def test_almost_nothing_clean_is_set_aside(count):
    aside = [calibrate(drawn(count, seed)).set_aside for seed in range(100)]
    assert np.mean(np.array(aside) > 0) < 0.1
    assert np.mean(aside) < 0.2


def test_what_is_set_aside_counts_as_normal_in_the_bound_until_there_is_much_of_it():
    one = calibrate(np.append(drawn(298), 50.0))
    assert one.set_aside == 1
    # All 299 images, the one above: were it normal after all, the bound would still be true.
    assert one.bound == rate_bound(1, 299, 0.95)
    many = calibrate(np.append(drawn(269), np.full(30, 50.0)))
    assert many.set_aside == 30
    assert many.bound == rate_bound(3, 272, 0.95)


def test_equal_high_scores_are_set_aside_together_or_not_at_all():
    values = np.concatenate([drawn(90), np.full(40, 9.0)])  # too many for a few defects
    assert calibrate(values).set_aside == 0


@pytest.mark.parametrize(("rate", "count"), [(0.01, 400), (0.05, 200), (0.05, 40)])
def test_expected_share_of_uncertain_images_is_about_right(rate, count):
    expected, found = [], []
    for seed in range(100):
        band = calibrate(drawn(count, seed), rate, uncertain_share=0.03).uncertain
        new = drawn(5_000, 10_000 + seed)
        expected.append(band.expected_share)
        found.append(((new > band.lower) & (new <= band.upper)).mean())
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.2)


def test_entry_of_the_sidecar():
    entry = calibrate(drawn(300)).to_dict()
    expected = {"false_alarm_rate", "confidence", "bound", "images", "set_aside", "method", "uncertain", "quantiles"}
    assert expected <= set(entry)
    assert set(entry["uncertain"]) == {"lower", "upper", "expected_share"}
    assert len(entry["quantiles"]) == 101


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(19.0), r"20 scores of normal images or more, found shape \(19,\)"),
        (np.zeros((30, 2)), r"found shape \(30, 2\)"),
        (np.append(np.arange(40.0), [np.nan, np.inf]), "2 of 42 scores are not finite"),
        (np.full(50, 1.25), "Half of the 50 scores are 1.25"),
        (np.append(np.full(40, 2.0), np.arange(10.0)), "Half of the 50 scores are 2"),
        (np.append(np.arange(10.0), np.full(45, 30.0)), "Half of the 55 scores are 30"),
        (np.append(np.linspace(0, 0.9, 24), np.full(26, 1.0)), "26 of 50 scores are 1: no threshold"),
    ],
)
def test_scores_that_cannot_be_used(values, message):
    with pytest.raises(ValueError, match=message):
        calibrate(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"false_alarm_rate": 0.0}, "false_alarm_rate must be a share above 0 and below 0.5, found 0.0"),
        ({"false_alarm_rate": 0.5}, "false_alarm_rate .* found 0.5"),
        ({"false_alarm_rate": float("nan")}, "false_alarm_rate .* found nan"),
        ({"confidence": 1.0}, "confidence must be at least 0.5 and below 1, found 1.0"),
        ({"confidence": 0.3}, "confidence .* found 0.3"),
        ({"uncertain_share": 0.0}, "uncertain_share .* found 0.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        calibrate(np.arange(50.0), **settings)


def test_images_left_out_before_are_accounted_for():
    scores = np.random.default_rng(0).normal(size=400)
    alone, after = calibrate(scores), calibrate(scores, left_out=40)
    assert (after.images, after.set_aside) == (440, 40)
    assert after.bound == pytest.approx(rate_bound(4, 404, 0.95))
    assert alone.bound < 0.01 < after.bound
    assert after.threshold >= alone.threshold
