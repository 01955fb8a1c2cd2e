"""Show that a deployed model decides like the checkpoint it came from, and how fast it is on this machine."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.deploy.detector import Detector, Prediction
from anomalib_metarefine.deploy.sidecar import SIDECAR
from anomalib_metarefine.images.reading import check_images, read_image
from anomalib_metarefine.model.calibration import RawScores, raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.evaluation import Detection, detect, folder_labels
from anomalib_metarefine.model.export import sidecar_of
from anomalib_metarefine.model.graph import Graph, GraphScores
from anomalib_metarefine.model.post_processor import score_scales
from anomalib_metarefine.model.speed import latency, throughput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anomalib.models import AnomalibModule

    from anomalib_metarefine.deploy.sidecar import Sidecar

logger = logging.getLogger(__name__)

# Largest relative difference of raw scores. 8 bits move single scores by more: there 95 % of the images are held to it.
TOLERANCES = {"FP32": 1e-3, "FP16": 1e-2, "INT8": 0.1}
AUROC_TOLERANCE = 0.005
_NOT_COMPARED = ("files", "versions", "schema")  # of metadata.json: the detector checks the first, none decides
_TIMED_IMAGES = 32  # decoded and held in memory
_TOLD = 10  # times that the progress of the comparison is told


@dataclass(frozen=True)
class Verification:
    """What comparing a deployed model with its checkpoint gave.

    Attributes:
        images (int): Images compared.
        precision (str): Of the deployed model, by its graph.
        largest_difference (float): Largest relative difference of raw scores, before any clamp; of image scores and of
            the highest scores of the maps.
        decisions_differ (list[str]): Images that the two decide differently about, though their scores are further from
            every limit than the precision allows for.
        auroc (tuple[float, float] | None): Image AUROC of checkpoint and of deployed model, if images are labelled.
        detection (Detection | None): What the deployed model finds among images that the checkpoint was not trained
            on, if they are labelled.
        latency_ms (dict[str, float]): ``p50``, ``p95`` and ``p99`` of one image at a time, from pixels to decision.
        images_per_second (float): With as many images in flight as there are processors.
        problems (list[str]): What speaks against the deployment; empty if nothing does.
    """

    images: int
    precision: str
    largest_difference: float
    decisions_differ: list[str]
    auroc: tuple[float, float] | None
    detection: Detection | None
    latency_ms: dict[str, float]
    images_per_second: float
    problems: list[str]


class _Answers(NamedTuple):
    """What the deployed model said about each image: its graph, opened up, and the detector of the line."""

    graph: list[GraphScores]
    detector: list[Prediction]


def verify_deployment(
    folder: str | Path,
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    anomalous: np.ndarray | None = None,
    runs: int = 300,
    model: str | None = None,
    say: Callable[[str], None] = logger.info,
) -> Verification:
    """Compare a deployed model with its checkpoint on images, and time it.

    Args:
        folder (str | Path): Of the exported model, OpenVINO or ONNX.
        checkpoint (str | Path): That it was exported from.
        paths (Sequence[str | Path]): Images, of the sizes that the line has.
        anomalous (np.ndarray | None): ``[N]`` bool, labels; ``None`` takes them from folders named ``good`` and others.
        runs (int): Inferences to time.
        model (str | None): See `load_checkpoint`.
        say (Callable): Gets a line of text now and then about what is being done.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a model file is not the one that was exported, or there is no image that can be read.
    """
    if runs < 1:
        msg = f"runs must be at least 1, found {runs}."
        raise ValueError(msg)
    detector, loaded = Detector(folder), load_checkpoint(checkpoint, model)
    if not isinstance(loaded.post_processor, PostProcessor):
        msg = f"The model in {checkpoint} has no post-processor of anomalib's, so there is no threshold to compare."
        raise ValueError(msg)
    graph = Graph(detector.file)
    labels = folder_labels(paths) if anomalous is None and paths else anomalous
    hashes, problems = _read(paths, detector.bit_depth)
    readable = np.array([str(path) in hashes for path in paths])
    labels = None if labels is None else np.asarray(labels)[readable]
    paths = [path for path, can in zip(paths, readable, strict=True) if can]
    say(f"scoring {len(paths)} images with the checkpoint")
    wanted = raw_scores(loaded, paths)
    answers = _run(graph, detector, paths, say)
    scales = score_scales(loaded.post_processor)
    normalized = (np.array([getattr(answer, name) for answer in answers.graph]) for name in ("image", "pixel"))
    found = RawScores(*(_raw(values, scale) for values, scale in zip(normalized, scales, strict=True)))

    kind = "onnx" if detector.file.suffix == ".onnx" else "openvino"
    exact = bool(detector.sidecar and detector.sidecar.input.get("antialias"))  # a false claim shows in the scores
    expected = sidecar_of(loaded, kind, graph.precision, graph.accepts, exact)
    differences, different = _compare(wanted, found, graph)
    problems += [*_other_metadata(detector.sidecar, expected), *different, *_other_path(answers)]
    if different:
        worst = int(np.nan_to_num(np.abs(found.image - wanted.image)).argmax())
        problems += _explain(loaded, paths[worst], found.image[worst])
    differ = _decided_differently(wanted.image, answers.detector, expected, TOLERANCES[graph.precision])
    if differ.any():
        problems.append(f"{differ.sum()} images are decided differently, further from a limit than precision allows")
    auroc = detection = None
    threshold = scales[0]["threshold"]
    if not np.isfinite(threshold):
        problems.append("the checkpoint has no threshold, so no decision was compared: calibrate it, then export it")
    elif labels is not None:
        seen = set(getattr(loaded, "training_images", {}).values())
        new = np.array([hashes[str(path)] not in seen for path in paths])
        auroc = _auroc(labels, wanted.image, found.image)
        detection = detect(found.image[new], labels[new], threshold) if new.any() else None
        problems += _worse(auroc, detection)
    say(f"timing {runs} inferences, one at a time and then in parallel")
    images = [read_image(path, detector.bit_depth).pixels for path in paths[:_TIMED_IMAGES]]
    return Verification(
        images=len(paths),
        precision=graph.precision,
        largest_difference=float(differences.max()) if differences.size else float("nan"),
        decisions_differ=[str(path) for path, differs in zip(paths, differ, strict=True) if differs],
        auroc=auroc,
        detection=detection,
        latency_ms=latency(detector, images, runs),
        images_per_second=throughput(folder, images, runs),
        problems=problems,
    )


def _read(paths: Sequence[str | Path], bit_depth: int | None) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of the images that can be read, by path, and a problem if there are others."""
    if not paths:
        msg = "There is no image to verify the deployment with."
        raise ValueError(msg)
    checked = check_images(paths, bit_depth)
    if not checked.hashes:
        msg = f"None of the {len(paths)} images can be read. The first is {next(iter(checked.unreadable))}."
        raise ValueError(msg)
    count = len(checked.unreadable)
    return checked.hashes, [f"{count} images can't be read and were not compared"] if count else []


def _auroc(labels: np.ndarray, expected: np.ndarray, found: np.ndarray) -> tuple[float, float] | None:
    if labels.all() or not labels.any():
        return None
    return float(roc_auc_score(labels, expected)), float(roc_auc_score(labels, found))


def _worse(auroc: tuple[float, float] | None, detection: Detection | None) -> list[str]:
    """What labelled images say against the deployed model."""
    problems = []
    if auroc and auroc[0] - auroc[1] > AUROC_TOLERANCE:
        problems.append(f"image AUROC falls from {auroc[0]:.4f} to {auroc[1]:.4f}, allowed is {AUROC_TOLERANCE:g}")
    if detection and detection.finds_nothing:
        problems.append(f"not one of {detection.defective} defective images is found at the threshold")
    return problems


def _run(graph: Graph, detector: Detector, paths: Sequence[str | Path], say: Callable[[str], None]) -> _Answers:
    answers = _Answers([], [])
    for number, path in enumerate(paths):
        if number % -(-len(paths) // _TOLD) == 0:
            say(f"deployed model: image {number + 1} of {len(paths)}")
        image = read_image(path, detector.bit_depth).pixels
        answers.graph.append(graph.scores(image))
        answers.detector.append(detector.predict(image))
    return answers


def _raw(normalized: np.ndarray, scale: dict[str, float]) -> np.ndarray:
    """Raw scores from normalised ones that were not clamped; NaN where they can't be had."""
    span = scale["maximum"] - scale["minimum"]
    if np.isnan(span):  # the model does not normalise
        return normalized
    return (normalized - 0.5) * span + scale["threshold"] if span > 0 else np.full_like(normalized, np.nan)


def _compare(wanted: RawScores, found: RawScores, graph: Graph) -> tuple[np.ndarray, list[str]]:
    """Relative differences of all scores that could be compared, and what is wrong with them."""
    problems, differences = [], []
    tolerance = TOLERANCES[graph.precision]
    for name, is_open, expected, had in zip(("image scores", "anomaly maps"), graph.open, wanted, found, strict=True):
        if expected is None:
            continue
        if not is_open:
            problems.append(f"the {name} of {len(had)} images could not be compared: the graph's clamp was not found")
            continue
        difference = np.abs(had - expected) / np.maximum(np.abs(expected), np.finfo(float).tiny)
        if not np.isfinite(difference).all():
            lost = int((~np.isfinite(difference)).sum())
            problems.append(f"the {name} of {lost} images could not be compared: they are not finite")
            difference = difference[np.isfinite(difference)]
        differences.append(difference)
        if not difference.size:
            continue
        worst = float(np.quantile(difference, 0.95) if graph.precision == "INT8" else difference.max())
        if worst > tolerance:
            problems.append(f"{name} differ by up to {worst:.2g} relative, {graph.precision} allows {tolerance:g}")
    return np.concatenate(differences) if differences else np.empty(0), problems


def _decided_differently(
    scores: np.ndarray, answers: Sequence[Prediction], expected: Sidecar, tolerance: float
) -> np.ndarray:
    """``[N]`` bool: where the line decides otherwise than the checkpoint would, with its threshold and its band."""
    threshold = expected.image_score.get("threshold", np.nan)
    band = (expected.calibration or {}).get("uncertain")
    limits = [threshold, *((band["lower"], band["upper"]) if band else ())]
    decided = np.where(scores > threshold, "anomalous", "normal")
    if band:
        decided = np.where((band["lower"] <= scores) & (scores <= band["upper"]), "uncertain", decided)
    clear = np.min([np.abs(scores - limit) / np.maximum(np.abs(limit), 1e-12) for limit in limits], axis=0) > tolerance
    return clear & (decided != np.array([answer.decision for answer in answers]))


def _other_path(answers: _Answers) -> list[str]:
    """Whether the detector of the line gives other scores than the graph it runs."""
    clamped = np.clip([answer.image for answer in answers.graph], 0, 1)
    gap = np.abs(clamped - [answer.score for answer in answers.detector])
    wrong = int((gap > TOLERANCES["FP32"]).sum())
    told = f"the detector gives {wrong} images another score than the graph, by up to {gap.max():.2g}"
    return [told] if wrong else []


def _other_metadata(sidecar: Sidecar | None, expected: Sidecar) -> list[str]:
    """Everything in ``metadata.json`` that is not what checkpoint and graph say."""
    if sidecar is None:
        return [f"there is no {SIDECAR}: neither origin nor thresholds can be compared. `metarefine export` writes it"]
    wanted, found = (_flat({k: v for k, v in asdict(s).items() if k not in _NOT_COMPARED}) for s in (expected, sidecar))
    return [
        f"{key} is {found.get(key, 'missing')} in {SIDECAR}, {wanted.get(key, 'missing')} by checkpoint and graph"
        for key in sorted({*wanted, *found})
        if not _same(wanted.get(key), found.get(key))
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401
    """All values by their path, e.g. ``calibration.uncertain.lower``."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: value}


def _same(wanted: Any, found: Any) -> bool:  # noqa: ANN401
    numbers = [np.nan if value is None else value for value in (wanted, found)]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        return bool(np.isclose(*numbers, rtol=1e-6, equal_nan=True))
    return wanted == found


def _explain(model: AnomalibModule, path: str | Path, found: float) -> list[str]:
    """Whether scores differ because the graph was exported with anomalib's own resize."""
    pre_processor = model.pre_processor
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return []
    pre_processor.transform = get_exportable_transform(transform)
    try:
        score = raw_scores(model, [path]).image[0]
    finally:
        pre_processor.transform = transform
    if abs(found - score) > TOLERANCES["FP32"] * abs(score):
        return []
    return [
        "the graph resizes without antialiasing, as anomalib's own export does: the checkpoint scores the same once "
        "that is switched off there, too. Export with `metarefine export`"
    ]
