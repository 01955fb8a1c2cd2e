"""Show that a deployed model decides like the checkpoint it came from, and how fast it is on this machine."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.deploy.detector import Detector, read_image
from anomalib_metarefine.model.calibration import load_model, raw_scores
from anomalib_metarefine.model.export import score_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.deploy.sidecar import Sidecar
    from anomalib_metarefine.model.lightning_model import MetaRefine

# Largest relative difference of raw scores. 8 bits move single scores by more than rounding does: there only decisions
# and the ranking are held to something.
TOLERANCES = {"FP32": 1e-3, "FP16": 1e-2, "INT8": 0.1}
AUROC_TOLERANCE = 0.005
_NORMAL = ("good", "normal", "ok")  # folders that label the images in them, and by contrast all others
_TIMED_IMAGES = 32  # decoded and held in memory
_WARM_UP = 20  # inferences


@dataclass(frozen=True)
class Verification:
    """What comparing a deployed model with its checkpoint gave.

    Attributes:
        images (int): Images compared.
        precision (str): Of the deployed model.
        largest_difference (float): Largest relative difference of raw scores, clamped as the graph does it.
        decisions_differ (list[str]): Images that the two decide differently about, though their scores are further from
            the threshold than the precision allows for.
        auroc (tuple[float, float] | None): Image AUROC of checkpoint and of deployed model, if folders named ``good``
            (or ``normal``, ``ok``) and others label the images.
        latency_ms (dict[str, float]): ``p50``, ``p95`` and ``p99`` of one image at a time, from pixels to decision.
        images_per_second (float): With as many images in flight as there are processors.
        problems (list[str]): What speaks against the deployment; empty if nothing does.
    """

    images: int
    precision: str
    largest_difference: float
    decisions_differ: list[str]
    auroc: tuple[float, float] | None
    latency_ms: dict[str, float]
    images_per_second: float
    problems: list[str]


def verify_deployment(
    folder: str | Path, checkpoint: str | Path, paths: Sequence[str | Path], runs: int = 300
) -> Verification:
    """Compare a deployed model with its checkpoint on images, and time it.

    Args:
        folder (str | Path): Of the exported model, OpenVINO or ONNX, with its ``metadata.json``.
        checkpoint (str | Path): That it was exported from.
        paths (Sequence[str | Path]): Readable images, of the sizes that the line has.
        runs (int): Inferences to time.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a model file is not the one that was exported, an image can't be read, or there is none.
    """
    if not paths:
        msg = "There is no image to verify the deployment with."
        raise ValueError(msg)
    detector, model = Detector(folder), load_model(checkpoint)
    sidecar = detector.sidecar
    if sidecar is None or detector.threshold is None:
        msg = f"{folder} has no metadata.json with a threshold. Validate or calibrate the model, and export it again."
        raise ValueError(msg)
    scores = raw_scores(model, paths, progress=True).image
    low, high = sidecar.raw_score(0), sidecar.raw_score(1)
    expected = scores.clip(low, high)  # as the graph does
    found = np.array(
        [detector.predict(read_image(path)).raw_score for path in track(paths, "deployed model", transient=True)]
    )
    precision = sidecar.model["precision"]
    difference = np.abs(found - expected) / np.abs(scores)
    differ = (found > detector.threshold) != (expected > detector.threshold)
    differ &= np.abs(expected / detector.threshold - 1) > TOLERANCES[precision]
    auroc = _auroc(paths, expected, found)
    largest = float(difference.max())
    problems = [*_other_origin(sidecar, model), *_other_scores(precision, largest, int(differ.sum()), auroc)]
    images = [read_image(path) for path in paths[:_TIMED_IMAGES]]
    return Verification(
        images=len(paths),
        precision=precision,
        largest_difference=largest,
        decisions_differ=[str(path) for path, differs in zip(paths, differ, strict=True) if differs],
        auroc=auroc,
        latency_ms=_latency(detector, images, runs),
        images_per_second=_throughput(folder, images, runs),
        problems=problems,
    )


def _other_origin(sidecar: Sidecar, model: MetaRefine) -> list[str]:
    """Signs that the deployed model was not exported from this checkpoint, or not since it was calibrated."""
    problems = []
    for name, scale in zip(("image_score", "anomaly_map"), score_scales(model.post_processor), strict=True):
        deployed = getattr(sidecar, name)
        for key, value in scale.items():
            recorded = np.nan if deployed[key] is None else deployed[key]
            if not np.isclose(recorded, value, rtol=1e-6, equal_nan=True):
                problems.append(f"{key} of {name} is {recorded:g} in metadata.json, {value:g} in the checkpoint")
    for key, value in model.provenance.items():
        if sidecar.training.get(key) != value:
            problems.append(f"{key} of the training is {sidecar.training.get(key)} in metadata.json, {value} here")
    return problems


def _other_scores(precision: str, largest: float, differ: int, auroc: tuple[float, float] | None) -> list[str]:
    problems = []
    if precision != "INT8" and largest > TOLERANCES[precision]:
        problems.append(f"scores differ by up to {largest:.2g} relative, {precision} allows {TOLERANCES[precision]:g}")
    if differ:
        problems.append(f"{differ} images are decided differently, further from the threshold than {precision} allows")
    if auroc and auroc[0] - auroc[1] > AUROC_TOLERANCE:
        problems.append(f"image AUROC falls from {auroc[0]:.4f} to {auroc[1]:.4f}, allowed is {AUROC_TOLERANCE:g}")
    return problems


def _auroc(paths: Sequence[str | Path], expected: np.ndarray, found: np.ndarray) -> tuple[float, float] | None:
    anomalous = np.array([Path(path).parent.name.lower() not in _NORMAL for path in paths])
    if anomalous.all() or not anomalous.any():
        return None
    return float(roc_auc_score(anomalous, expected)), float(roc_auc_score(anomalous, found))


def _latency(detector: Detector, images: list[np.ndarray], runs: int) -> dict[str, float]:
    seconds = []
    for image in itertools.islice(itertools.cycle(images), _WARM_UP + runs):
        begin = time.perf_counter()
        detector.predict(image)
        seconds.append(time.perf_counter() - begin)
    quantiles = np.percentile(seconds[_WARM_UP:], [50, 95, 99]) * 1e3
    return dict(zip(("p50", "p95", "p99"), quantiles.tolist(), strict=True))


def _throughput(folder: str | Path, images: list[np.ndarray], runs: int) -> float:
    detector = Detector(folder, streams=os.cpu_count() or 1, verify=False)
    for image in images:  # compiles a network for each size
        detector.predict(image)
    begin = time.perf_counter()
    answers = deque(detector.submit(image) for image in itertools.islice(itertools.cycle(images), runs))
    while answers:
        answers.popleft().result()
    return runs / (time.perf_counter() - begin)
