"""Megabytes that loading and running one exported graph takes; in a process of its own, with OpenVINO alone.

Usage: ``python -m anomalib_metarefine.benchmark.peak_memory model.xml 256 256 f32``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov


def main(path: str, height: str, width: str, precision: str) -> None:
    """Print the growth of the process's peak."""
    core = ov.Core()
    before = _peak()
    shape = [1, 3, int(height), int(width)]
    model = core.read_model(path)
    model.reshape(shape)
    core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})(np.zeros(shape, dtype=np.float32))
    print(_peak() - before)


def _peak() -> float:
    """Megabytes. From Linux's own books: what ``getrusage`` tells includes the process that started this one."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3


if __name__ == "__main__":
    main(*sys.argv[1:])
