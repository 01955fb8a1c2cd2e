import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalib_metarefine.refinement.scores import hybrid, standardised
from anomalib_metarefine.robust import lower_side_scale

RNG = np.random.default_rng(0)
PARTS = {"likelihood": RNG.normal(5, 0.1, 40), "neighbours": RNG.normal(100, 20, 40)}
BOTH = dict.fromkeys(PARTS, 1.0)
KEPT = np.arange(40) < 30


def test_parts_of_any_scale_count_by_their_weight():
    scores = hybrid(PARTS, BOTH, KEPT)
    rescaled = hybrid(PARTS | {"neighbours": 1e6 * PARTS["neighbours"]}, BOTH, KEPT)
    np.testing.assert_allclose(rescaled, scores, rtol=1e-6)
    only = hybrid(PARTS, {"likelihood": 1.0, "neighbours": 0.0}, KEPT)
    assert np.argsort(only).tolist() == np.argsort(PARTS["likelihood"]).tolist()


def test_in_robust_standard_deviations_of_the_kept_images():
    assert lower_side_scale(hybrid(PARTS, BOTH, KEPT)[KEPT]) == pytest.approx((0, 1))


def test_every_variant_is_measured_by_its_own():
    values = np.concatenate([RNG.normal(0, 1, 60), RNG.normal(50, 5, 20)])
    variants = np.repeat([0, 1], [60, 20])
    values[70] = 90  # eight of its variant's spreads
    own = standardised(values, np.ones(80, dtype=bool), variants)
    assert own.argmax() == 70
    assert np.abs(np.median(own[variants == 1])) < 1
    pooled = standardised(values, np.ones(80, dtype=bool))
    assert (pooled[variants == 1] > pooled[variants == 0].max()).all()


def test_a_variant_that_is_rejected_whole_still_has_a_scale():
    variants = np.repeat([0, 1], [30, 10])
    assert np.isfinite(standardised(PARTS["likelihood"], KEPT, variants)).all()


@given(arrays(np.float64, st.integers(1, 20), elements=st.integers(-5, 5).map(float)))
def test_never_nan(values):
    assert np.isfinite(hybrid({"likelihood": values}, {"likelihood": 1.0}, np.ones(len(values), bool))).all()
