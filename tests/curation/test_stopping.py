"""The stopping rule: its promises, by simulation of whole reviews."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom, rankdata

from anomalib_metarefine.curation.stopping import DOUBT, LEVEL, Forecast, Look, forecast, left_at_most, standing

UNSURE = Forecast(about=1.0, doubt=0.9, more=50)
CLEAN, DIRTY = Look(audit=True, dirty=False), Look(audit=True, dirty=True)


def exact(draws: int, pool: int) -> int:
    """Upper bound of the dirty images among ``pool``, from ``draws`` clean ones drawn at once."""
    return max(left for left in range(pool + 1) if hypergeom.cdf(0, pool, left, draws) > 1 - LEVEL)


def review(rng, dirty, order, per_page=10, audits=2):
    """Pages of a review, with what had been looked at after each: pages from the order that learn from the answers."""
    rest, looks, value = set(range(len(dirty))), {}, order.copy()
    while rest:
        queue = sorted(rest, key=lambda i: -value[i])[:per_page]
        rest -= set(queue)
        drawn = rng.permutation(sorted(rest))[:audits].tolist()
        rest -= set(drawn)
        looks |= {i: Look(i in drawn, bool(dirty[i])) for i in (*queue, *drawn)}
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
        pages = (list(looks.values()) for looks in review(rng, dirty, order))
        broken += any(left_at_most(looks, 80) < dirty.sum() - sum(look.dirty for look in looks) for looks in pages)
    assert broken <= 150 * (1 - LEVEL) + 3 * np.sqrt(150 * LEVEL * (1 - LEVEL))


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("separation", [0.0, 3.0])
def test_where_one_can_stop_nine_tenths_are_found(share, separation):
    rng = np.random.default_rng(1)
    recalls = []
    for _ in range(25):
        dirty = rng.random(150) < share
        order = rng.normal(size=150) + separation * dirty
        for looks in review(rng, dirty, order):
            answers = {i: bool(dirty[i]) for i, look in looks.items()}
            state = standing(list(looks.values()), 150, forecast(order, answers))
            if state.stop:
                recalls.append(state.found / max(dirty.sum(), 1))
                break
    assert len(recalls) == 25
    likely = 1 - DOUBT
    assert np.mean(np.array(recalls) >= 0.9) >= likely - 2 * np.sqrt(likely * DOUBT / 25)


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


def clear(count, dirty):
    """Images of which the first ones in the order are dirty."""
    return -np.arange(count, dtype=float), np.arange(count) < dirty


def told(dirty, count):
    return {i: bool(dirty[i]) for i in range(count)}


def test_a_clear_order_needs_few_looks_and_one_that_tells_nothing_needs_nearly_all():
    values, dirty = clear(150, 15)
    looks = next(count for count in range(150) if count and forecast(values, told(dirty, count)).doubt <= DOUBT)
    assert 15 < looks < 75
    rng = np.random.default_rng(0)
    unlucky = rng.permutation(dirty)
    looks = next(count for count in range(1, 151) if forecast(values, told(unlucky, count)).doubt <= DOUBT)
    assert unlucky[:looks].sum() >= 0.9 * 15
    assert looks > 100


def test_a_defect_that_the_order_does_not_see_raises_the_forecast():
    values, dirty = clear(150, 15)
    answers = told(dirty, 50) | dict.fromkeys((70, 100, 120, 140), False)
    assert forecast(values, answers | {100: True}).about > 2 * forecast(values, answers).about


def test_more_clean_looks_lower_the_doubt_and_as_many_as_it_says_are_enough():
    values, dirty = clear(400, 20)
    state = forecast(values, told(dirty, 40))
    assert state.doubt > DOUBT
    assert forecast(values, told(dirty, 40 + state.more)).doubt <= DOUBT * 1.02  # in steps of two images
    assert forecast(values, told(dirty, 40 + state.more - 3)).doubt > DOUBT


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 100), st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_forecast_is_possible_and_blind_to_the_scale_of_the_order(answers, unseen, random):
    values = np.array([random.gauss(0, 1) for _ in range(len(answers) + unseen)])
    asked = dict(enumerate(answers))
    state = forecast(values, asked)
    assert 0 <= state.doubt <= 1 + 1e-9
    assert 0 <= state.about <= unseen
    assert (state.more == 0) is (state.doubt <= DOUBT)
    assert forecast(rankdata(values), asked) == state


@pytest.mark.parametrize("found", [0, 3, 30])
def test_says_how_many_clean_looks_are_missing(found):
    looks = [Look(False, True)] * found + [Look(False, False)] * 12 + [CLEAN] * 8
    far = UNSURE._replace(more=500)
    state = standing(looks, 200, far)
    assert not state.stop
    assert f"next {state.more} images are all clean" in state.reason
    assert standing([*looks, *[CLEAN] * state.more], 200, far).stop
    assert not standing([*looks, *[CLEAN] * (state.more - 1)], 200, far).stop
    assert standing(looks, 200, UNSURE._replace(more=1)).more == 1
    assert standing(looks, 200, UNSURE._replace(more=0)).stop


def test_nothing_is_estimated_from_next_to_nothing():
    for looks in ([], [Look(False, None)] * 12):
        state = standing(looks, 100, Forecast(11, 0, 0))
        assert state.about is None
        assert not state.stop
    assert standing([CLEAN] * 9, 100, UNSURE).about is None
    assert standing([CLEAN] * 10, 100, UNSURE._replace(about=11)).about == 11


def test_the_estimate_stays_within_what_is_possible():
    looks, many = [CLEAN] * 90, UNSURE._replace(about=50)
    assert standing(looks, 100, many).about == standing(looks, 100, many).at_most == left_at_most(looks, 100)
    done = standing([*looks, *[DIRTY] * 10], 100, UNSURE)
    assert (done.stop, done.more, done.about, done.found) == (True, 0, 0, 10)
    assert done.reason == "Every image was looked at."
