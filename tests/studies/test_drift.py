import numpy as np
import pytest

from studies import drift
from studies.drift import DEFECTIVE, GOOD, Lines


@pytest.fixture
def scores() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    good = rng.normal(0, 1, 300)
    return {GOOD: good, "far": good + 4, "same": good.copy(), DEFECTIVE: rng.normal(8, 1, 50)}


def lines(scores, **given) -> Lines:
    return Lines(scores, **{"images": 200, "rate": 0.01, "horizon": 10_000, "rng": np.random.default_rng(0)} | given)


def test_streams_hold_the_stated_share_of_defects(scores):
    drawn = lines(scores)._draw(GOOD, 20_000, 0.05)
    assert np.isin(drawn, scores[DEFECTIVE]).mean() == pytest.approx(0.05, abs=0.01)
    assert np.isin(lines(scores)._draw("far", 100), scores["far"]).all()


def test_delay_counts_from_the_turn(scores):
    early, late = (lines(scores).delays("far", 5, before, 100) for before in (0, 300))
    assert ((early > 0) & (early < 40)).all()
    assert ((late > 0) & (late < 40)).all()
    assert (lines(scores).delays("same", 3, 50, 200) == drift._FAR).all()


def test_false_alarms_count_streams(scores):
    assert lines(scores).false_alarms(5, 200, 0.05) == 0
    assert lines(scores).false_alarms_of_halves(5, 200, 0.05) == 0
    careless = lines(scores, rate=0.99, horizon=1)
    assert careless.false_alarms(5, 400, 0.0) == 5
    assert careless.false_alarms_of_halves(5, 400, 0.0) == 5
