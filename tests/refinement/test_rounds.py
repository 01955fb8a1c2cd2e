import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anomalib_metarefine.refinement.rounds import Refinement, record, run_rounds
from anomalib_metarefine.refinement.rules import MADFence, Rejection, ShareFence
from anomalib_metarefine.refinement.scales import Scales

VALUES = np.concatenate([np.random.default_rng(0).normal(0, 1, 90), np.full(10, 30.0)])


class Scripted:
    """A rule that rejects what it is told to, round by round."""

    def __init__(self, *rounds):
        self.rounds = iter(rounds)

    def reject(self, scales):
        images = np.zeros(len(scales.scores), dtype=bool)
        images[list(next(self.rounds))] = True
        return Rejection(images, 0.0)


def distance(kept):
    return Scales(np.abs(VALUES - VALUES[kept].mean()))


def test_converges_on_the_clean_part():
    fitted = []
    found = run_rounds(lambda kept: (fitted.append(kept.copy()), distance(kept))[1], 100, MADFence(k=6), 5)
    assert np.flatnonzero(~found.kept).tolist() == list(range(90, 100))
    assert found.stop_reason == "converged"
    np.testing.assert_array_equal(fitted[-1], found.kept)  # the last fit is the one that is kept


def test_an_image_rejected_too_early_comes_back():
    found = run_rounds(lambda _kept: Scales(np.arange(8.0)), 8, Scripted([7], []), 5)
    assert [outcome.rejected for outcome in found.rounds] == [1, 0]
    assert found.kept.all()
    assert found.stop_reason == "cycle"


def test_zero_rounds_reject_nothing():
    found = run_rounds(distance, 100, MADFence(), 0)
    assert found.kept.all()
    assert found.stop_reason == "off"


def test_rounds_end_when_there_are_no_more():
    found = run_rounds(lambda _kept: Scales(np.arange(8.0)), 8, Scripted([7], [6, 7]), 2)
    assert found.stop_reason == "rounds"
    assert np.flatnonzero(~found.kept).tolist() == [6, 7]


@given(st.sets(st.integers(0, 7)))
def test_half_of_the_images_are_kept_whatever_a_rule_says(images):
    found = run_rounds(lambda _kept: Scales(np.arange(8.0)), 8, Scripted(images), 1)
    assert found.kept.sum() == max(4, 8 - len(images))
    if len(images) > 4:  # then those with the lowest scores
        assert found.kept.tolist() == [True] * 4 + [False] * 4


@given(st.dictionaries(st.integers(0, 7), st.booleans(), min_size=1))
@example({0: False, 1: False, 2: False, 3: False})  # all that the rule would keep
def test_neither_rule_nor_the_limit_moves_what_a_person_decided(answers):
    def refine():
        return run_rounds(lambda _kept: Scales(np.arange(8.0)), 8, ShareFence(share=0.5), 3, answers)

    if len(answers) == 8 and not any(answers.values()):
        with pytest.raises(ValueError, match="8 of 8 images were rejected by a person"):
            refine()
        return
    found = refine()
    assert found.kept.any()
    assert all(found.kept[image] == keep for image, keep in answers.items())


def test_a_record_survives_json():
    found = run_rounds(distance, 100, MADFence(k=6), 5)
    paths = [f"{i:03d}.png" for i in range(100)]
    kept = record(found, paths, "One aligned product.", {"x.png": "NaN"}, 0.1)
    assert Refinement.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept
    assert sorted(kept.rejected) == paths[90:]
    table = kept.table()
    assert table.decision.eq("reject").sum() == 10
    assert {"score_round_1", "score_round_2"} <= set(table)
