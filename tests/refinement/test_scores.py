import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalib_metarefine.refinement.scores import hybrid
from anomalib_metarefine.robust import lower_side_scale

RNG = np.random.default_rng(0)
PARTS = {"likelihood": RNG.normal(5, 0.1, 40), "neighbours": RNG.normal(100, 20, 40)}
KEPT = np.arange(40) < 30


def test_parts_of_any_scale_count_by_their_weight():
    scores, units = hybrid(PARTS, {"likelihood": 1.0, "neighbours": 1.0}, KEPT)
    rescaled, _ = hybrid(
        PARTS | {"neighbours": 1e6 * PARTS["neighbours"]}, {"likelihood": 1.0, "neighbours": 1.0}, KEPT
    )
    np.testing.assert_allclose(rescaled, scores, rtol=1e-6)
    only, _ = hybrid(PARTS, {"likelihood": 1.0, "neighbours": 0.0}, KEPT)
    assert np.argsort(only).tolist() == np.argsort(PARTS["likelihood"]).tolist()
    moved, _ = hybrid(
        PARTS | {"neighbours": PARTS["neighbours"] + 3 * (np.arange(40) == 39)}, dict.fromkeys(PARTS, 1.0), KEPT
    )
    assert moved[39] - scores[39] == pytest.approx(3 * units["neighbours"])


def test_in_robust_standard_deviations_of_the_kept_images():
    scores, _ = hybrid(PARTS, dict.fromkeys(PARTS, 1.0), KEPT)
    assert lower_side_scale(scores[KEPT]) == pytest.approx((0, 1))


@given(arrays(np.float64, st.integers(1, 20), elements=st.integers(-5, 5).map(float)))
def test_never_nan(values):
    assert np.isfinite(hybrid({"likelihood": values}, {"likelihood": 1.0}, np.ones(len(values), bool))[0]).all()
