import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalib_metarefine.curation.rules import RULES, FDRFence, ShorthFence, TukeyFence, get_rule, lower_side_scale

# Whole numbers: shift and scale are then exact, and ties (a flat training set) come up often.
scores = arrays(np.float64, st.integers(1, 60), elements=st.integers(-1000, 1000).map(float))
rules = st.sampled_from([rule() for rule in RULES.values()])


@given(rules, scores, st.randoms())
def test_order_does_not_matter(rule, values, random):
    shuffled = values.copy()
    random.shuffle(shuffled)
    assert rule.fence(shuffled) == rule.fence(values)


@given(rules, scores, st.integers(-100, 100), st.sampled_from([0.5, 2.0, 8.0]))
def test_fence_moves_with_shift_and_scale(rule, values, shift, scale):
    assert rule.fence(scale * values + shift) == pytest.approx(scale * rule.fence(values) + shift, abs=1e-6)


@given(rules, scores)
def test_never_rejects_everything(rule, values):
    assert (values <= rule.fence(values)).any()


@given(rules, st.integers(1, 50), st.floats(-5, 5))
def test_equal_scores_reject_nothing(rule, count, value):
    assert rule.fence(np.full(count, value)) == np.inf


def clean_and_dirty(share: float, count: int = 400) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(1)
    dirty = round(share * count)
    return np.concatenate([rng.normal(0, 1, count - dirty), rng.normal(40, 1, dirty)]), dirty


@pytest.mark.parametrize("rule", [ShorthFence(), FDRFence()])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.4, 0.45])
def test_robust_fences_hold_below_half(rule, share):
    values, dirty = clean_and_dirty(share)
    rejected = values > rule.fence(values)
    assert rejected[-dirty:].all()
    assert rejected[:-dirty].mean() < 0.05


def test_tukey_breaks_down_past_a_quarter():
    values, dirty = clean_and_dirty(0.2)
    assert (values > TukeyFence().fence(values))[-dirty:].all()
    values, dirty = clean_and_dirty(0.3)
    assert not (values > TukeyFence().fence(values)).any()


def test_fdr_fence_needs_more_evidence_for_one_outlier_than_for_many():
    rng = np.random.default_rng(0)
    clean = rng.normal(0, 1, 200)
    one, many = np.append(clean, 8.0), np.append(clean, np.full(60, 8.0))
    assert FDRFence().fence(one) >= 8.0
    assert FDRFence().fence(many) < 8.0


def test_scale_of_normal_scores():
    centre, spread = lower_side_scale(np.random.default_rng(0).normal(3, 2, 20_000))
    assert centre == pytest.approx(3, abs=0.4)
    assert spread == pytest.approx(2, rel=0.2)


def test_unknown_rule_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no rejection rule 'iqrr'.*\['fdr', 'iqr', 'shorth'\]"):
        get_rule("iqrr")
