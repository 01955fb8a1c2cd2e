"""Latency and memory on images of many sizes against images of one size, one at a time, side by side.

    python -m studies.sizes MODEL_DIR

The model is one that `metarefine export` wrote, for images of any size. All rows take turns in one process with one
thread; ratios are to the graph compiled for the one size, which no folder of many sizes could have.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import openvino as ov

from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.detector import Detector
from anomalib_metarefine.images.reading import read_image
from studies.common import markdown

if TYPE_CHECKING:
    from collections.abc import Callable

_IMAGES, _ROUNDS, _SIDE, _NEW = 100, 5, 300, 300
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "1", "PERFORMANCE_HINT": "LATENCY"}


def graph(folder: Path, sides: tuple[int, int]) -> Callable[[np.ndarray], object]:
    """The graph in plain OpenVINO, compiled for a size, or for any (-1, -1)."""
    core = ov.Core()
    model = core.read_model(folder / "model.xml")
    model.reshape([1, 3, *sides])
    network = core.compile_model(model, "CPU", _EXACT)
    return lambda image: network(np.ascontiguousarray(image.transpose(2, 0, 1)[None]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    generator = np.random.default_rng(0)
    cells = [read_image(path).pixels for path in make_elpv_samples(packaged_root(), "mono").image_path[:_IMAGES]]
    one = [cv2.resize(cell, (_SIDE, _SIDE)) for cell in cells]

    def many() -> list[np.ndarray]:  # in every round others, as on a line that crops parts
        sides = generator.integers(_SIDE * 4 // 5, _SIDE * 6 // 5, (_IMAGES, 2)).tolist()
        return [cv2.resize(cell, tuple(size)) for cell, size in zip(cells, sides, strict=True)]

    many_in = [many() for _ in range(_ROUNDS + 1)]
    detector = Detector(folder, threads=1)
    rows = {
        "graph compiled for the one size, one size": (graph(folder, (_SIDE, _SIDE)), [one] * (_ROUNDS + 1)),
        "`Detector`, one size": (detector.predict, [one] * (_ROUNDS + 1)),
        "`Detector`, 100 sizes": (detector.predict, many_in),
        "graph of free sizes, 100 sizes": (graph(folder, (-1, -1)), many_in),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(_ROUNDS + 1):
        for i in range(_IMAGES):
            for name, (score, images) in rows.items():
                begin = time.perf_counter()
                score(images[turn][i])
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - begin)
    quantiles = {name: np.percentile(values, [50, 95]) for name, values in seconds.items()}
    base = next(iter(quantiles.values()))
    grown = {name: _memory_grown(score, generator) for name, (score, _) in rows.items() if "100" in name}
    cells_of = [
        [name, *(f"{value:.2f}" for value in found / base), f"{grown[name]:.0f}" if name in grown else ""]
        for name, found in quantiles.items()
    ]
    print(markdown(["", "p50, ratio", "p95, ratio", f"MB for {_NEW} more sizes"], cells_of))


def _memory_grown(score: Callable[[np.ndarray], object], generator: np.random.Generator) -> float:
    image = generator.random((2 * _SIDE, 2 * _SIDE, 3), dtype=np.float32)
    before = _memory()
    for rows, columns in generator.integers(_SIDE // 2, 2 * _SIDE, (_NEW, 2)).tolist():
        score(np.ascontiguousarray(image[:rows, :columns]))
    return _memory() - before


def _memory() -> float:
    """Resident memory in MB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
