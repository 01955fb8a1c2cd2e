"""How fast a deployed model is on this machine."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.deploy.detector import Detector

if TYPE_CHECKING:
    from pathlib import Path

_WARM_UP = 20  # inferences


def latency(detector: Detector, images: list[np.ndarray], runs: int) -> dict[str, float]:
    """Milliseconds from pixels to decision, one image at a time: ``p50``, ``p95`` and ``p99`` of so many runs."""
    seconds = []
    for image in itertools.islice(itertools.cycle(images), _WARM_UP + runs):
        begin = time.perf_counter()
        detector.predict(image)
        seconds.append(time.perf_counter() - begin)
    quantiles = np.percentile(seconds[_WARM_UP:], [50, 95, 99]) * 1e3
    return dict(zip(("p50", "p95", "p99"), quantiles.tolist(), strict=True))


def throughput(folder: str | Path, images: list[np.ndarray], runs: int) -> float:
    """Images per second, with as many in flight as there are processors."""
    detector = Detector(folder, streams=os.cpu_count() or 1, verify=False)
    for image in images:  # compiles a network for each size
        detector.predict(image)
    begin = time.perf_counter()
    answers = deque(detector.submit(image) for image in itertools.islice(itertools.cycle(images), runs))
    while answers:
        answers.popleft().result()
    return runs / (time.perf_counter() - begin)
