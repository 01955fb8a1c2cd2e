"""anomalib's post-processing as it is exported: everything that can be decided beforehand is."""

from __future__ import annotations

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import nn


class FrozenPostProcessor(nn.Module):
    """anomalib's post-processing of a finished model: one scale, one shift and one comparison for each output.

    anomalib's own decides about missing thresholds and empty ranges inside of the graph, which costs ten operations on
    every pixel. Here it is decided once.

    Args:
        post_processor (PostProcessor): With its thresholds and ranges.
    """

    def __init__(self, post_processor: PostProcessor) -> None:
        super().__init__()
        self.thresholding = post_processor.enable_thresholding
        self.normalizing = post_processor.enable_normalization
        self.image, self.pixel = score_scales(post_processor)
        self.image_limit = float(post_processor.normalized_image_threshold)
        self.pixel_limit = float(post_processor.normalized_pixel_threshold)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalised scores ``[B]`` and maps ``[B x 1 x H x W]`` in [0, 1], labels and masks."""
        score = self._normalize(predictions.pred_score, self.image)
        anomaly_map = self._normalize(predictions.anomaly_map, self.pixel)
        label = score > self.image_limit if self.thresholding else None
        mask = anomaly_map > self.pixel_limit if self.thresholding else None
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    def _normalize(self, values: torch.Tensor, scale: dict[str, float]) -> torch.Tensor:
        span = scale["maximum"] - scale["minimum"]
        if not self.normalizing or np.isnan(span):
            return values
        if span == 0:  # all validation images had one score: anomalib then tells only above from below
            return 0.5 + 0.5 * torch.sign(values - scale["threshold"])
        return ((values - scale["threshold"]) / span + 0.5).clamp(0, 1)


def score_scales(post_processor: PostProcessor) -> tuple[dict[str, float], dict[str, float]]:
    """Raw threshold, minimum and maximum of image scores and of anomaly maps, as anomalib takes them.

    Where there is no threshold, it takes the middle between minimum and maximum. NaN where a model was never validated.
    """
    scales = []
    for kind in ("image", "pixel"):
        low, high, threshold = (
            getattr(post_processor, f"{kind}_{name}").item() for name in ("min", "max", "threshold")
        )
        threshold = (low + high) / 2 if np.isnan(threshold) else threshold
        scales.append({"threshold": threshold, "minimum": low, "maximum": high})
    return scales[0], scales[1]
