"""The stopping rule: its promises, by simulation of whole reviews."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from anomalib_metarefine.curation.stopping import LEVEL, Look, left_at_most, recall_p_value, standing

CLEAN, DIRTY = Look(audit=True, dirty=False), Look(audit=True, dirty=True)


def exact(draws: int, pool: int) -> int:
    """Upper bound of the dirty images among ``pool``, from ``draws`` clean ones drawn at once."""
    return max(left for left in range(pool + 1) if hypergeom.cdf(0, pool, left, draws) > 1 - LEVEL)


def review(rng, dirty, order, per_page=10, audits=2):
    """Pages of a review, with what had been looked at after each: pages from the order that learn from the answers."""
    rest, looks, value = set(range(len(dirty))), [], order.copy()
    while rest:
        queue = sorted(rest, key=lambda i: -value[i])[:per_page]
        rest -= set(queue)
        drawn = rng.permutation(sorted(rest))[:audits].tolist()
        rest -= set(drawn)
        looks += [Look(False, bool(dirty[i])) for i in queue] + [Look(True, bool(dirty[i])) for i in drawn]
        for i in (*queue, *drawn):  # neighbours in the list are alike: the order depends on the audit's answers too
            value[max(i - 2, 0) : i + 3] += 1 if dirty[i] else -0.3
        yield looks


@pytest.mark.parametrize("share", [0.03, 0.15, 0.4])
@pytest.mark.parametrize("separation", [-2.0, 0.0, 3.0])
def test_the_bound_holds_after_every_page_of_95_percent_of_reviews(share, separation):
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(150):
        dirty = rng.random(80) < share
        order = rng.normal(size=80) + separation * dirty
        pages = review(rng, dirty, order)
        broken += any(left_at_most(looks, 80) < dirty.sum() - sum(look.dirty for look in looks) for looks in pages)
    assert broken <= 150 * (1 - LEVEL) + 3 * np.sqrt(150 * LEVEL * (1 - LEVEL))


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("separation", [0.0, 1.0, 3.0])
def test_where_one_can_stop_nine_tenths_are_found(share, separation):
    rng = np.random.default_rng(1)
    recalls = []
    for _ in range(60):
        dirty = rng.random(150) < share
        for looks in review(rng, dirty, rng.normal(size=150) + separation * dirty):
            state = standing(looks, 150, about=0)
            if state.stop:
                recalls.append(state.found / max(dirty.sum(), 1))
                break
    assert len(recalls) == 60
    assert np.mean(np.array(recalls) >= 0.9) >= 0.9


def test_is_nearly_the_exact_bound_while_all_draws_are_clean():
    for draws in (5, 20, 50, 100, 200, 290):
        bound = left_at_most([CLEAN] * draws, 300)
        assert exact(draws, 300) <= bound <= 1.15 * exact(draws, 300) + 1


def test_knows_nothing_without_an_audit_and_everything_at_the_end():
    assert left_at_most([], 50) == 50
    assert left_at_most([Look(False, False)] * 30, 50) == 20  # the order may be the wrong way round
    assert left_at_most([CLEAN] * 50, 50) == 0
    with pytest.raises(ValueError, match="51 images were shown, but there are only 50"):
        left_at_most([CLEAN] * 51, 50)


look = st.builds(Look, audit=st.booleans(), dirty=st.sampled_from([True, False, False, None]))


@given(st.lists(look, max_size=40), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_what_has_no_answer_only_loosens_the_bound(looks, unseen):
    total = len(looks) + unseen
    bound = left_at_most(looks, total)
    assert sum(shown.dirty is None for shown in looks) <= bound <= total - sum(s.dirty is not None for s in looks)
    for answer in (True, False):
        completed = [Look(s.audit, answer if s.dirty is None else s.dirty) for s in looks]
        found_later = sum(s.dirty is None for s in looks) if answer else 0
        assert bound >= left_at_most(completed, total) + found_later


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_the_recall_test_is_a_probability_that_a_clean_image_never_raises(answers, unseen):
    total = len(answers) + unseen + 1
    p = recall_p_value(answers, total)
    assert 0 <= p <= 1
    assert recall_p_value([*answers, False], total) <= p + 1e-12


def test_the_recall_test_by_hand():
    # One found among 10: a recall of 0.9 is missed with one more among the 10, and 5 of these were looked at since.
    assert recall_p_value([True] + [False] * 5, 11) == pytest.approx(0.5)
    assert recall_p_value([], 10) == 1
    assert recall_p_value([True, False], 2) == 0


@pytest.mark.parametrize("found", [0, 3, 30])
def test_says_how_many_clean_looks_are_missing(found):
    looks = [Look(False, True)] * found + [Look(False, False)] * 12 + [CLEAN] * 8
    state = standing(looks, 200, about=1.0)
    assert not state.stop
    assert f"next {state.more} images are all clean" in state.reason
    after = [standing([*looks, *[kind] * state.more], 200, 1.0).stop for kind in (CLEAN, Look(False, False))]
    before = [standing([*looks, *[kind] * (state.more - 1)], 200, 1.0).stop for kind in (CLEAN, Look(False, False))]
    assert any(after)
    assert not any(before)


def test_nothing_is_estimated_before_the_first_answer():
    for looks in ([], [Look(False, None)] * 12):
        assert standing(looks, 100, about=11).about is None
    assert standing([CLEAN], 100, about=11).about == 11


def test_the_estimate_stays_within_what_is_possible():
    looks = [CLEAN] * 90
    assert standing(looks, 100, about=50).about == standing(looks, 100, about=50).at_most == left_at_most(looks, 100)
    assert standing(looks, 100, about=-1).about == 0
    done = standing([*looks, *[DIRTY] * 10], 100, about=3)
    assert (done.stop, done.more, done.about, done.found) == (True, 0, 0, 10)
    assert done.reason == "Every image was looked at."
