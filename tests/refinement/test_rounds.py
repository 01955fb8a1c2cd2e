import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anomalib_metarefine.refinement.rounds import Refinement, refine
from anomalib_metarefine.refinement.rules import ShorthFence, TukeyFence

VALUES = np.concatenate([np.random.default_rng(0).normal(0, 1, 90), np.full(10, 30.0)])
PATHS = [f"{i:03d}.png" for i in range(100)]


def distance_to_kept_mean(values):
    return lambda kept: np.abs(values - values[kept].mean())


def test_converges_on_the_clean_part():
    calls = []

    def score(kept):
        calls.append(kept.copy())
        return distance_to_kept_mean(VALUES)(kept)

    result = refine(score, PATHS, ShorthFence().fence, max_rounds=5)
    assert sorted(result.rejected) == PATHS[90:]
    assert result.stop_reason == "converged"
    np.testing.assert_array_equal(calls[-1], result.kept)  # the last fit is the one that is kept


def test_an_image_rejected_too_early_comes_back():
    scripted = iter([np.array([0, 1, 2, 3, 4, 5, 6, 99.0]), np.arange(8.0), np.arange(8.0)])
    result = refine(lambda kept: next(scripted), PATHS[:8], TukeyFence().fence, max_rounds=5)
    assert result.rounds[0].rejected == 1
    assert all(result.kept)


def test_zero_rounds_reject_nothing():
    result = refine(distance_to_kept_mean(VALUES), PATHS, ShorthFence().fence, max_rounds=0)
    assert all(result.kept)
    assert (result.stop_reason, result.rounds) == ("off", [])


def test_stops_at_the_limit_and_in_a_cycle():
    low, high = np.array([0, 1, 2, 3, 99.0]), np.array([99.0, 1, 2, 3, 0])

    def alternating(kept):
        return high if kept[0] and not kept[-1] else low

    assert refine(alternating, PATHS[:5], TukeyFence().fence, max_rounds=1).stop_reason == "rounds"
    assert refine(alternating, PATHS[:5], TukeyFence().fence, max_rounds=9).stop_reason == "cycle"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(-1e6, 1e6))
def test_at_least_half_is_always_kept(values, fence):
    result = refine(lambda kept: np.array(values), PATHS[: len(values)], lambda scores: fence, max_rounds=2)
    assert sum(result.kept) >= len(values) / 2


def test_survives_json_and_tabulates_every_round():
    result = refine(distance_to_kept_mean(VALUES), PATHS, ShorthFence().fence, max_rounds=5)
    assert Refinement.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    table = result.table()
    assert table.decision.value_counts().to_dict() == {"keep": 90, "reject": 10}
    assert f"score_round_{len(result.rounds)}" in table


def test_what_a_person_decided_holds_against_the_fence():
    known = {95: True, 3: False}
    fitted = []

    def score(kept):
        fitted.append(kept.copy())
        return distance_to_kept_mean(VALUES)(kept)

    result = refine(score, PATHS, ShorthFence().fence, max_rounds=5, known=known)
    assert sorted(result.rejected) == sorted({*PATHS[90:], PATHS[3]} - {PATHS[95]})
    assert all(kept[95] and not kept[3] for kept in fitted)
