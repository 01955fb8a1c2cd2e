import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.deploy.monitor import Monitor, Recovery

QUANTILES = np.linspace(0, 1, 101).tolist()
DETECTOR = SimpleNamespace(threshold=1.2, calibration={"quantiles": QUANTILES, "images": 1000, "set_aside": 0})
RUN = {"model": "m", "settings": {"drift": {"window": 30}}}


def monitor():
    return Monitor(DETECTOR, {"window": 30}, (1.0, 3.0))


def stream():
    """Drift that begins and ends, twice."""
    scores = np.random.default_rng(0).uniform(0, 1, 900)
    scores[100:160] += 0.9
    scores[600:660] += 0.9
    return scores.tolist()


def journal(scores, state_every):
    """What a run writes, and after how many records each image's block ends."""
    seen = monitor()
    records = [{"event": "start", **RUN}]
    for i, score in enumerate(scores, 1):
        records.append({"path": str(i), "raw_score": score})
        records += seen.update(score)
        if i % state_every == 0:
            records.append({"event": "state", "monitor": seen.to_dict()})
    return json.loads(json.dumps(records)), seen


RECORDS, SEEN = journal(stream(), 97)


def test_the_stream_has_all_kinds_of_events():
    kinds = {
        (record["event"], record.get("drifted")) for record in RECORDS if record.get("event") in ("drift", "threshold")
    }
    assert kinds == {("drift", True), ("drift", False), ("threshold", None)}


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(1, len(RECORDS)))
def test_goes_on_after_any_record(cut):
    recovery = Recovery(RUN)
    for record in RECORDS[:cut]:
        recovery.take(record)
    again = monitor()
    missed = recovery.apply(again)
    events = [record for record in RECORDS[:cut] if record.get("event") in ("drift", "threshold")] + missed
    done = sum("path" in record for record in RECORDS[:cut])
    for score in stream()[done:]:
        events += again.update(score)
    expected = [record for record in RECORDS if record.get("event") in ("drift", "threshold")]
    assert json.loads(json.dumps(events)) == expected
    assert again.to_dict() == SEEN.to_dict()
    assert again.drifted == SEEN.drifted


def test_scores_of_another_run_do_not_count():
    recovery = Recovery(RUN)
    for record in [*RECORDS, {"event": "start", **RUN, "model": "other"}, {"path": "x", "raw_score": 9.0}]:
        recovery.take(record)
    again = monitor()
    assert recovery.apply(again) == []
    assert again.to_dict() == monitor().to_dict()
    for record in [{"event": "start", **RUN}, {"path": "x", "raw_score": 0.5}]:
        recovery.take(record)
    recovery.apply(again)
    assert again.to_dict()["drift"]["count"] == 1


def test_a_restart_of_the_same_run_counts():
    recovery = Recovery(RUN)
    for record in [*RECORDS[:50], RECORDS[0], *RECORDS[50:]]:
        recovery.take(record)
    again = monitor()
    assert recovery.apply(again) == []
    assert again.to_dict() == SEEN.to_dict()


def test_without_a_calibration():
    plain = Monitor(SimpleNamespace(threshold=1.2, calibration=None), {})
    assert (plain.update(5.0), plain.drifted, plain.threshold) == ([], None, 1.2)
    with pytest.raises(ValueError, match="needs a model with a calibration"):
        Monitor(SimpleNamespace(threshold=1.2, calibration=None), {}, (1, 2))
    with pytest.raises(ValueError, match="must hold the calibrated threshold"):
        Monitor(DETECTOR, {}, (2, 3))
