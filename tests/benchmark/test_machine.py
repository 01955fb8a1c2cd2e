import math

import numpy as np
import pytest

from anomalib_metarefine.benchmark import machine
from anomalib_metarefine.benchmark.machine import PeakMemory, peak_mb

linux = pytest.mark.skipif(not machine._RESET.exists(), reason="only Linux tells and resets the peak")


@linux
def test_the_peak_is_of_what_came_since():
    earlier = np.ones(2**27, dtype=np.uint8)
    del earlier
    peak = PeakMemory()
    assert peak.growth() < 20
    passing = np.ones(10**8, dtype=np.uint8)
    del passing
    assert 95 < peak.growth() < 130


@linux
def test_what_is_kept_for_others_does_not_count():
    kept = []
    peak = PeakMemory(kept=lambda: sum(array.nbytes for array in kept))
    kept.append(np.ones(10**8, dtype=np.uint8))
    assert peak.growth() < 20


def test_elsewhere_it_is_not_a_number(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "missing")
    monkeypatch.setattr(machine, "_RESET", tmp_path / "missing" / "file")
    assert math.isnan(peak_mb())
    assert math.isnan(PeakMemory().growth())
