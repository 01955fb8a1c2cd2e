"""Megabytes that loading and running one exported graph takes; in a process of its own, with OpenVINO alone.

Usage: ``python -m studies.peak_memory model.xml 256 256 f32``.
"""

from __future__ import annotations

import sys

import numpy as np
import openvino as ov

from anomalib_metarefine.benchmark.machine import peak_mb


def main(path: str, height: str, width: str, precision: str) -> None:
    """Print the growth of the process's peak."""
    core = ov.Core()
    before = peak_mb()
    shape = [1, 3, int(height), int(width)]
    model = core.read_model(path)
    model.reshape(shape)
    core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})(np.zeros(shape, dtype=np.float32))
    print(peak_mb() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
