"""anomalib's metrics of images and pixels, from one sort of the scores.

anomalib's own classes keep every score several times, sort all of them for every figure, and put raw scores through
a sigmoid in single precision, after which all large ones are equal. Ten million pixels then take a quarter of a minute
and two gigabytes. Here, the scores of defects are the only thresholds, since nothing changes between two of them that
a figure depends on: a second, and no more memory than the anomaly maps. The figures are the same (see the tests).

References:
    - Bergmann et al., "MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection", CVPR 2019
      (AUPRO).
    - Bertoldo et al., "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed and Low Tolerance",
      arXiv 2401.01984.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from anomalib.metrics import Evaluator
from anomalib.utils.cv import connected_components_cpu

if TYPE_CHECKING:
    from anomalib.data import Batch

_PRO_LIMIT = 0.3  # anomalib's defaults
_PIMO_BOUNDS = (1e-5, 1e-4)
_NAN = float("nan")


class Steps(NamedTuple):
    """What lies above every threshold worth trying: the K distinct scores of defects, in descending order.

    Attributes:
        hits (np.ndarray): ``[K]``, defects at the threshold.
        true (np.ndarray): ``[K]``, defects at or above it.
        false (np.ndarray): ``[K]``, normal ones at or above it.
        false_above (np.ndarray): ``[K]``, normal ones above it.
        defects (int): All defects.
        normal (int): All normal ones.
    """

    hits: np.ndarray
    true: np.ndarray
    false: np.ndarray
    false_above: np.ndarray
    defects: int
    normal: int


def steps(defects: np.ndarray, normal: np.ndarray) -> Steps:
    """Sort scores.

    Args:
        defects (np.ndarray): ``[P]``, at least one.
        normal (np.ndarray): ``[N]``, at least one; sorted in place.

    Returns:
        Steps: Counts at every threshold.
    """
    thresholds, hits = np.unique(defects, return_counts=True)
    normal.sort()
    false = len(normal) - np.searchsorted(normal, thresholds, side="left")
    above = len(normal) - np.searchsorted(normal, thresholds, side="right")
    hits = hits[::-1]
    return Steps(hits, np.cumsum(hits), false[::-1], above[::-1], len(defects), len(normal))


def auroc(found: Steps) -> float:
    """Probability that a defect scores higher than a normal one; ties count half."""
    below = found.normal - (found.false + found.false_above) / 2
    return float((found.hits * below).sum() / (found.defects * found.normal))


def aupr(found: Steps) -> float:
    """Average precision: precision at every threshold, weighted by the recall that it adds."""
    return float((found.hits * found.true / (found.true + found.false)).sum() / found.defects)


def f1_max(found: Steps) -> float:
    """The best F1 score of any threshold."""
    return float((2 * found.true / (found.defects + found.true + found.false)).max())


def aupro(found: Steps, overlap: np.ndarray) -> float:
    """Area under the per-region overlap, up to a false positive rate of 0.3, divided by it.

    Args:
        found (Steps): Of pixels.
        overlap (np.ndarray): ``[K]``, mean share of the regions of defects at or above each threshold.

    Returns:
        float: In [0, 1].
    """
    # Left and right of every threshold; between two of them the overlap stays, and false positives come in.
    before = np.concatenate([[0.0], overlap[:-1]])
    y = np.concatenate([[0.0], np.stack([before, overlap], 1).ravel(), [1.0]])
    x = np.concatenate([[0.0], np.stack([found.false_above, found.false], 1).ravel() / found.normal, [1.0]])
    whole = np.diff(x)
    width = np.diff(np.minimum(x, _PRO_LIMIT))
    reached = y[:-1] + np.diff(y) * np.divide(width, whole, out=np.zeros_like(whole), where=whole > 0)
    return float((width * (y[:-1] + reached)).sum() / 2 / _PRO_LIMIT)


def aupimo(maps: np.ndarray, masks: np.ndarray) -> float:
    """Area under the per-image overlap over the logarithm of the false positive rate of normal images, 1e-5 to 1e-4.

    anomalib's thresholds are equally spaced, 300,000 of them; these are all that there are.

    Args:
        maps (np.ndarray): ``[N x H x W]``.
        masks (np.ndarray): ``[N x H x W]`` of bool.

    Returns:
        float: Mean over images with defects, in [0, 1]; NaN if the rate can't be measured, for which 1e5 pixels in
            normal images are needed.
    """
    has_defect = masks.any(axis=(1, 2))
    normal = maps[~has_defect].ravel()
    low, high = _PIMO_BOUNDS
    if len(normal) * low < 1 or not has_defect.any():
        return _NAN
    last = max(0, len(normal) - 1 - int(2 * high * len(normal)))
    enough = normal[normal >= np.partition(normal, last)[last]]
    levels, counts = np.unique(enough, return_counts=True)
    levels, rates = levels[::-1], np.cumsum(counts[::-1]) / len(normal)
    first, last = np.abs(rates - low).argmin(), np.abs(rates - high).argmin()
    if first == last:
        return _NAN
    levels, widths = levels[first + 1 : last + 1], np.diff(np.log(rates[first : last + 1]))
    areas = []
    for scores, mask in zip(maps[has_defect], masks[has_defect], strict=True):
        defects = np.sort(scores[mask])
        # Half of those that are as high as a normal pixel, as a trapezoid has it.
        found = sum(len(defects) - np.searchsorted(defects, levels, side=side) for side in ("left", "right")) / 2
        areas.append((found / len(defects) * widths).sum() / np.log(high / low))
    return float(np.clip(areas, 0, 1).mean())


def image_figures(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Figures of image scores.

    Args:
        scores (np.ndarray): ``[N]``, of any size.
        labels (np.ndarray): ``[N]`` of bool.

    Returns:
        dict[str, float]: ``AUROC``, ``AUPR``, ``F1Max``; NaN without both normal and defective images.
    """
    if labels.all() or not labels.any():
        return dict.fromkeys(("AUROC", "AUPR", "F1Max"), _NAN)
    found = steps(scores[labels], scores[~labels])
    return {"AUROC": auroc(found), "AUPR": aupr(found), "F1Max": f1_max(found)}


def pixel_figures(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Figures of anomaly maps.

    Args:
        maps (np.ndarray): ``[N x H x W]``, of any size.
        masks (np.ndarray): ``[N x H x W]`` of bool.

    Returns:
        dict[str, float]: ``AUROC``, ``AUPR``, ``F1Max``, ``AUPRO``, ``AUPIMO``; NaN without both kinds of pixels.
    """
    if masks.all() or not masks.any():
        return dict.fromkeys(("AUROC", "AUPR", "F1Max", "AUPRO", "AUPIMO"), _NAN)
    weights, regions = [], 0
    for mask in masks[masks.any(axis=(1, 2))]:
        labels = connected_components_cpu(torch.from_numpy(mask)[None, None].float()).numpy()[0, 0][mask]
        sizes = np.bincount(labels)
        weights.append(1 / sizes[labels])
        regions += np.count_nonzero(sizes)
    defects = maps[masks]
    found = steps(defects, maps[~masks])
    place = np.unique(defects, return_inverse=True)[1]
    overlap = np.cumsum(np.bincount(place, np.concatenate(weights))[::-1]) / regions
    return {
        "AUROC": auroc(found),
        "AUPR": aupr(found),
        "F1Max": f1_max(found),
        "AUPRO": aupro(found, overlap),
        "AUPIMO": aupimo(maps, masks),
    }


class ScoreEvaluator(Evaluator):
    """Keeps what a test gives and makes figures of it.

    Attributes:
        figures (dict[str, float]): After a test: `image_figures` and `pixel_figures`, each with its prefix. Those of
            pixels are NaN where there are no masks or no anomaly maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.figures: dict[str, float] = {}

    def on_test_epoch_start(self, *_: Any) -> None:  # noqa: ANN401
        """Forget an earlier test."""
        self._scores, self._labels, self._maps, self._masks = [], [], [], []

    def on_test_batch_end(self, _trainer: Any, _module: Any, _outputs: Any, batch: Batch, *_: Any) -> None:  # noqa: ANN401
        """Keep scores and labels; anomaly maps and masks only where there are both."""
        self._scores.append(batch.pred_score.detach().double().flatten().cpu().numpy())
        self._labels.append(batch.gt_label.bool().flatten().cpu().numpy())
        if batch.anomaly_map is not None and batch.gt_mask is not None:
            masks = batch.gt_mask.bool().flatten(0, -3).cpu().numpy()
            self._masks.append(masks)
            self._maps.append(batch.anomaly_map.detach().float().reshape(masks.shape).cpu().numpy())

    def on_test_epoch_end(self, *_: Any) -> None:  # noqa: ANN401
        """Make the figures.

        Raises:
            ValueError: If a score is not a number.
        """
        scores, labels = np.concatenate(self._scores), np.concatenate(self._labels)
        if np.isnan(scores).any():
            msg = f"The model gave {np.isnan(scores).sum()} of {len(scores)} test images a score that is not a number."
            raise ValueError(msg)
        found = {f"image_{name}": value for name, value in image_figures(scores, labels).items()}
        none = np.zeros((0, 1, 1), dtype=bool)
        maps, masks = (np.concatenate(parts) if parts else none for parts in (self._maps, self._masks))
        self._maps, self._masks = [], []
        self.figures = found | {f"pixel_{name}": value for name, value in pixel_figures(maps, masks).items()}
