import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.deploy.bets import Bets
from anomalib_metarefine.deploy.drift import DriftMonitor, DriftState
from anomalib_metarefine.deploy.monitor import DynamicThreshold
from anomalib_metarefine.deploy.threshold import calibrate

QUANTILES = np.linspace(0, 1, 101)  # of uniform scores
finite = st.floats(-1e6, 1e6)


def monitor(images: int = 1000, **given) -> DriftMonitor:
    return DriftMonitor(QUANTILES, images, **given)


def feed(found: DriftMonitor, scores) -> list[DriftState]:
    return [found.update(score) for score in scores]


def uniform(count: int, seed: int = 0, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, count)


def alarms(streams: int, images: int, length: int, rate: float, horizon: int, defects: float) -> float:
    """Share of unchanged streams with an alarm, each with a reference of its own; all at once, by the same bets."""
    rng = np.random.default_rng(7)
    bets = Bets.make(QUANTILES, images, rate / 2, 0.05)
    level = np.round(bets.quantile * 100).astype(int)
    reference = np.quantile(rng.uniform(size=(streams, images)), QUANTILES, axis=1).T[:, level]
    sign = np.where(bets.upward, 1, -1)
    wealth, learned = np.zeros((streams, len(sign))), np.zeros((streams, len(sign)))
    alarmed = np.zeros(streams, dtype=bool)
    for count in range(length):
        scores = np.where(rng.random(streams) < defects, 2.0, rng.uniform(size=streams))
        past = sign * scores[:, None] > sign * reference
        wealth = np.logaddexp(0, wealth + bets.gains(past, count, learned))
        learned += past
        alarmed |= np.logaddexp.reduce(wealth, 1) - math.log(len(sign)) >= math.log1p(2 * horizon / rate)
    return alarmed.mean()


@pytest.mark.parametrize(("images", "defects"), [(30, 0.0), (300, 0.0), (300, 0.05)])
def test_false_alarms_stay_below_the_stated_rate_under_continuous_monitoring(images, defects):
    # A third of the streams may alarm. The bets themselves are worth about a quarter of that (docs/threshold.md).
    assert alarms(200, images, 2000, rate=0.33, horizon=2000, defects=defects) <= 0.2


def test_a_level_test_repeated_on_every_image_would_alarm():
    # What the betting is for: the same streams, the share above the median of the last 500, judged at 1 % each time.
    rng = np.random.default_rng(0)
    above = np.cumsum(rng.random((200, 2000)) > 0.5, axis=1)
    share = (above[:, 500:] - above[:, :-500]) / 500
    assert (np.abs(share - 0.5) > 2.576 * math.sqrt(0.25 / 500)).any(axis=1).mean() > 0.1


def test_defects_up_to_the_stated_share_are_no_drift_and_far_more_are():
    for share, drifted in ((0.05, False), (0.3, True)):
        rng = np.random.default_rng(3)
        scores = np.where(rng.random(4000) < share, 1e6, rng.uniform(size=4000))
        assert any(state.drifted for state in feed(monitor(), scores)) == drifted


@given(far=st.floats(1.0, 1e9))
@settings(max_examples=20, deadline=None)
def test_how_far_out_a_defect_scores_does_not_matter(far):
    near, out = monitor(), monitor()
    for score in (2.0, 0.3, 0.7, 2.0, 2.0):
        a, b = near.update(score), out.update(score * far if score == 2.0 else score)
        assert (a.statistic, a.drifted) == (b.statistic, b.drifted)


@pytest.mark.parametrize(("low", "high", "direction"), [(0.25, 1.25, "up"), (-0.25, 0.75, "down"), (5, 6, "up")])
@pytest.mark.parametrize("before", [0, 1500])
def test_a_shift_is_found_where_it_began_and_its_end_too(low, high, direction, before):
    found = monitor(window=200)
    quiet = feed(found, uniform(before))
    assert not any(state.drifted for state in quiet)
    turned = feed(found, uniform(400, 1, low, high))
    first = next(state for state in turned if state.drifted)
    assert first.count - before < 150
    assert abs(first.since - before) < 40
    assert first.direction == direction
    assert first.statistic >= first.limit
    assert turned[-1].drifted
    after = feed(found, uniform(1500, 2))
    last = next(state for state in after if not state.drifted)
    assert 150 <= last.count - before - 400 < 700
    assert last.since is None
    assert last.direction is None
    assert not after[-1].drifted


def test_a_drift_is_not_learned_as_normal():
    found = monitor(window=200)
    feed(found, uniform(500))
    assert feed(found, uniform(20_000, 1, 0.25, 1.25))[-1].drifted


def test_a_wider_distribution_is_found():
    assert feed(monitor(), uniform(1000, 0, -0.5, 1.5))[-1].drifted


def test_few_reference_images_need_a_larger_change():
    shifted = uniform(300, 0, 0.2, 1.2)
    assert feed(monitor(images=1000), shifted)[-1].drifted
    assert not feed(monitor(images=25), shifted)[-1].drifted


def test_scores_that_equal_a_quantile_are_not_past_it():
    # A model that clamps: all scores are 0.5. Neither above nor below the median, but never in the outer quarters.
    state = feed(monitor(), np.full(50, 0.5))[-1]
    assert not state.drifted
    assert state.quartiles == (0.5, 0.5, 0.5)


@given(scores=st.lists(finite, min_size=1, max_size=80))
@settings(max_examples=30, deadline=None)
def test_quartiles_are_of_the_latest_images(scores):
    state = feed(monitor(window=20), scores)[-1]
    assert state.images == min(len(scores), 20)
    assert state.count == len(scores)
    assert state.quartiles == pytest.approx(np.quantile(scores[-20:], [0.25, 0.5, 0.75]), abs=1e-6)


@given(cut=st.integers(0, 700), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_a_saved_monitor_goes_on_exactly_where_it_was(cut, seed):
    scores = np.concatenate([uniform(200, seed), uniform(200, seed, 0.3, 1.3), uniform(300, seed)])
    whole = monitor(images=200, window=60)
    states = feed(whole, scores)
    assert {state.drifted for state in states} == {True, False}
    first = monitor(images=200, window=60)
    feed(first, scores[:cut])
    second = DriftMonitor.from_dict(json.loads(json.dumps(first.to_dict(), allow_nan=False)))
    assert feed(second, scores[cut:]) == states[cut:]
    assert second.to_dict() == whole.to_dict()


def test_state_before_the_first_image():
    state = monitor().state
    assert (state.drifted, state.count, state.images, state.statistic) == (False, 0, 0, 0.0)
    assert all(math.isnan(quartile) for quartile in state.quartiles)


def test_memory_does_not_grow():
    found = monitor(window=50)
    feed(found, uniform(100))
    size = len(json.dumps(found.to_dict()))
    feed(found, uniform(2000, 1))
    assert len(json.dumps(found.to_dict())) < 1.1 * size


def test_from_calibration_leaves_out_what_was_set_aside():
    calibration = calibrate(np.append(uniform(300), np.full(5, 50.0))).to_dict()
    found = DriftMonitor.from_calibration(json.loads(json.dumps(calibration)), window=100)
    saved = found.to_dict()["settings"]
    assert (saved["images"], saved["window"]) == (300, 100)
    assert saved["reference_quantiles"] == calibration["quantiles"]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_and_leaves_no_trace(score):
    found = monitor()
    feed(found, uniform(10))
    before = found.to_dict()
    with pytest.raises(ValueError, match="must be a finite number, found"):
        found.update(score)
    assert found.to_dict() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": 19}, "images must be at least 20, found 19"),
        ({"window": 5}, "window must be at least 20, found 5"),
        ({"false_alarm_rate": 0}, r"false_alarm_rate must be in \(0, 1\), found 0"),
        ({"horizon": 0}, "horizon must be at least 1, found 0"),
        ({"defect_rate": 0.5}, r"defect_rate must be in \[0, 0.5\), found 0.5"),
        ({"reference_quantiles": QUANTILES[:50]}, r"must be 101 finite numbers in rising order, found shape \(50,\)"),
        ({"reference_quantiles": QUANTILES[::-1]}, "101 finite numbers in rising order, found a fall at 1"),
        ({"reference_quantiles": np.append(QUANTILES[:-1], np.nan)}, "in rising order, found 1 that are not finite"),
        ({"reference_quantiles": np.full(101, 2.5)}, "Half of the reference scores are 2.5"),
    ],
)
def test_settings_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        DriftMonitor(**{"reference_quantiles": QUANTILES, "images": 100, **given})


def test_a_saved_state_of_something_else():
    saved = monitor().to_dict()
    with pytest.raises(ValueError, match="not the saved state of a drift monitor"):
        DriftMonitor.from_dict({"count": 3})
    with pytest.raises(ValueError, match=r"of 3 bets, this version has \d+"):
        DriftMonitor.from_dict({**saved, "wealth": [0.0] * 3, "run": [0.0] * 3, "start": [1] * 3})


def test_nothing_here_needs_torch_or_anomalib():
    code = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'anomalib', 'lightning'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import anomalib_metarefine.deploy.drift, anomalib_metarefine.deploy.threshold"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def state(drifted: bool, count: int, since: int | None, quartiles, images: int = 100) -> DriftState:
    return DriftState(drifted, count, since, 0.0, 14.0, "up" if drifted else None, images, quartiles)


def threshold(limits=(0.5, 3.0)) -> DynamicThreshold:
    # 0.5 + 1.4 * (0.75 - 0.25) = 1.2
    return DynamicThreshold(1.2, limits, QUANTILES, window=100)


def test_threshold_follows_median_and_spread_once_the_window_is_of_the_drift():
    moving = threshold()
    far = (1.5, 2.0, 2.5)  # 2 + 1.4 * 1 = 3.4, past the limit
    assert moving.update(state(False, 300, None, far)) is None
    assert moving.update(state(True, 350, 310, far)) is None
    assert moving.update(state(True, 408, 310, far)) is None
    move = moving.update(state(True, 409, 310, (1.25, 1.5, 1.75)))
    assert (move.count, move.old, move.limited) == (409, 1.2, False)
    assert move.new == moving.threshold == pytest.approx(2.2)
    assert "up since image 310" in move.reason
    assert moving.update(state(True, 508, 310, far)) is None  # at most once a window
    move = moving.update(state(True, 509, 310, far))
    assert (move.new, move.limited) == (3.0, True)
    assert "limit" in move.reason
    assert moving.update(state(True, 700, 310, far)) is None  # it is there already
    back = moving.update(state(False, 900, None, (0.25, 0.5, 0.75)))
    assert (back.old, back.new) == (3.0, 1.2)
    assert "ended" in back.reason
    assert moving.update(state(False, 901, None, (0.25, 0.5, 0.75))) is None


def test_threshold_does_not_move_with_the_scatter_of_a_window():
    moving = threshold()
    for seed in range(200):
        quartiles = tuple(np.quantile(uniform(100, seed), [0.25, 0.5, 0.75]))
        assert moving.update(state(True, 1000 + 100 * seed, 1, quartiles)) is None


def test_threshold_stays_in_place_on_an_unchanged_stream_and_within_limits_on_any():
    found, moving = monitor(window=100), threshold((1.0, 1.4))
    assert all(moving.update(state) is None for state in feed(found, uniform(2000)))
    for score in uniform(2000, 1, 50, 500):  # anomalies only
        moving.update(found.update(score))
        assert 1.0 <= moving.threshold <= 1.4
    assert moving.threshold == 1.4


def test_threshold_goes_on_where_it_was():
    moving = threshold()
    moving.update(state(True, 409, 310, (1.25, 1.5, 1.75)))
    other = threshold()
    other.restore(json.loads(json.dumps(moving.to_dict())))
    later = state(True, 509, 310, (1.0, 1.1, 1.2))
    assert other.update(later) == moving.update(later)
    narrow = threshold((1.0, 1.5))
    narrow.restore({"threshold": 2.2, "moved_at": 409})
    assert narrow.threshold == 1.5


def test_limits_must_hold_the_threshold():
    with pytest.raises(ValueError, match=r"Limits must hold the calibrated threshold 1.2, found 1.3 to 2\."):
        threshold((1.3, 2.0))
