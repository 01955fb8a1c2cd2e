"""anomalib's metrics of images and pixels, by scikit-learn.

anomalib's own classes keep every score several times and put raw scores through a sigmoid in single precision, after
which all large ones are equal; ten million pixels take them a quarter of a minute and two gigabytes. The figures are
the same (see the tests).

References:
    - Bergmann et al., "MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection", CVPR 2019
      (AUPRO).
    - Bertoldo et al., "AUPIMO: Redefining Visual Anomaly Detection Benchmarks with High Speed and Low Tolerance",
      arXiv 2401.01984.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.metrics import Evaluator
from anomalib.utils.cv import connected_components_cpu
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

if TYPE_CHECKING:
    from anomalib.data import Batch

_PRO_LIMIT = 0.3  # anomalib's defaults
_PIMO_BOUNDS = (1e-5, 1e-4)
_NAN = float("nan")


def figures(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUROC, AUPR and best F1 of ``[N]`` scores and labels (true for defects); NaN unless there are both kinds."""
    if labels.all() or not labels.any():
        return dict.fromkeys(("AUROC", "AUPR", "F1Max"), _NAN)
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    return {
        "AUROC": float(roc_auc_score(labels, scores)),
        "AUPR": float(average_precision_score(labels, scores)),
        "F1Max": float(f1.max()),
    }


def aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """Area under the per-region overlap, up to a false positive rate of 0.3, divided by it.

    The mean overlap of the regions is the true positive rate of pixels that weigh less the larger their region is.

    Args:
        maps (np.ndarray): ``[N x H x W]``.
        masks (np.ndarray): ``[N x H x W]`` of bool, with both kinds of pixels.

    Returns:
        float: In [0, 1].
    """
    weights = np.ones(masks.shape)
    for weight, mask in zip(weights, masks, strict=True):
        if mask.any():
            regions = connected_components_cpu(torch.from_numpy(mask)[None, None].float()).numpy()[0, 0][mask]
            weight[mask] = 1 / np.bincount(regions)[regions]
    false, overlap, _ = roc_curve(masks.ravel(), maps.ravel(), sample_weight=weights.ravel())
    inside = false <= _PRO_LIMIT
    x = np.append(false[inside], _PRO_LIMIT)
    y = np.append(overlap[inside], np.interp(_PRO_LIMIT, false, overlap))
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2 / _PRO_LIMIT)


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


def pixel_figures(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """`figures`, AUPRO and AUPIMO of anomaly maps and masks ``[N x H x W]``; NaN without both kinds of pixels."""
    if masks.all() or not masks.any():
        regions = {"AUPRO": _NAN, "AUPIMO": _NAN}
    else:
        regions = {"AUPRO": aupro(maps, masks), "AUPIMO": aupimo(maps, masks)}
    return figures(maps.ravel(), masks.ravel()) | regions


class ScoreEvaluator(Evaluator):
    """Keeps what a test gives and makes figures of it.

    Attributes:
        figures (dict[str, float]): After a test: `figures` and `pixel_figures`, each with its prefix. Those of
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
        found = {f"image_{name}": value for name, value in figures(scores, labels).items()}
        none = np.zeros((0, 1, 1), dtype=bool)
        maps, masks = (np.concatenate(parts) if parts else none for parts in (self._maps, self._masks))
        self._maps, self._masks = [], []
        self.figures = found | {f"pixel_{name}": value for name, value in pixel_figures(maps, masks).items()}
