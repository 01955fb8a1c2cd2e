"""Defects recur: is what is unusual about an image what is unusual about other suspicious images?

A score of how unusual an image is knows nothing of *how* it is unusual. Scratches, broken fingers, stains come more
than once in a dirty set; odd but clean images are odd in ways of their own. So a linear model learns to tell the most
suspicious images of a set by the direction in which they deviate, and says of every image how suspicious it looks *from
what the others teach*: no image is among its own teachers, or odd images would confirm themselves. A person's answers
teach what the person said, wherever the image lies.

References:
    - Blum and Mitchell, "Combining Labeled and Unlabeled Data with Co-Training", COLT 1998: two views of the same
      example, one teaches the other.
    - Allen, "The Relationship Between Variable Selection and Data Augmentation and a Method for Prediction",
      Technometrics 1974: what ridge regression predicts for an example that is left out, in closed form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import rankdata

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_SUSPICIOUS = 0.2  # share of the images that are taken for suspicious, ever more so towards the highest score
_RIDGE = 10.0  # penalty, in variances of one feature over the images; 1 to 30 hardly differ
FEWEST_IMAGES = 20  # fewer were not tried


def deviations(
    chunks: Iterable[tuple[np.ndarray, torch.Tensor]],
    distances: torch.Tensor,
    kept: np.ndarray,
    variants: np.ndarray | None = None,
) -> np.ndarray:
    """What is unusual about each image: how its unusual patches differ from the mean patch of their place.

    The mean is that of the own variant; of all images where nothing of that is kept.

    Args:
        chunks (Iterable[tuple[np.ndarray, torch.Tensor]]): Numbers of ``n`` images and their patches ``[n x P x D]``,
            all ``N`` images one after the other.
        distances (torch.Tensor): ``[N x P]``, how unusual each patch is. Patches count by the square of what lies above
            the median of their image.
        kept (np.ndarray): ``[N]`` mask of the images that count as normal.
        variants (np.ndarray | None): ``[N]`` number of each image's variant; ``None`` if there is one.

    Returns:
        np.ndarray: ``[N x D]``.
    """
    variants = np.zeros(len(kept), dtype=int) if variants is None else variants
    weights = (distances - distances.median(1, keepdim=True).values).clamp_min(0).square()
    weights /= weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    counts = np.bincount(variants[kept], minlength=variants.max() + 1)
    seen, totals = [], [torch.zeros(())] * len(counts)
    for rows, patches in chunks:
        seen.append(torch.einsum("np,npd->nd", weights[rows], patches))
        for variant in np.unique(variants[rows]):
            own = kept[rows] & (variants[rows] == variant)
            totals[variant] = totals[variant] + patches[torch.from_numpy(own)].sum(0)
    unusual = torch.cat(seen)
    for variant, count in enumerate(counts):
        own = torch.from_numpy(variants == variant)
        usual = totals[variant] / count if count else sum(totals) / kept.sum()
        unusual[own] -= weights[own] @ usual
    return unusual.double().numpy()


def likeness(
    features: np.ndarray, scores: np.ndarray, answers: Mapping[int, bool] | None = None
) -> tuple[np.ndarray, float]:
    """How suspicious every image looks to a linear model of the other images, and how far that is to be trusted.

    Args:
        features (np.ndarray): ``[N x D]``, see `deviations`.
        scores (np.ndarray): ``[N]``, higher is more anomalous; only their order counts.
        answers (Mapping[int, bool] | None): Images that a person has decided to keep (true) or to reject.

    Returns:
        tuple[np.ndarray, float]: ``[N]``, higher is more suspicious; and what the model explains of the others'
            suspicion over what it doesn't, in variances, at most 1. Where parts lie anywhere it explains little.

    Example:
        >>> features = np.array([[0.0], [0.1], [0.2], [0.1], [0.0], [3.0], [3.2], [0.1]])
        >>> scores = np.array([0.0, 0.1, 0.2, 0.3, 0.1, 0.2, 2.0, 2.5])
        >>> likeness(features, scores)[0].argmax()  # 5 is like 6, which is suspicious; nothing is like 7
        np.int64(5)
    """
    count = len(scores)
    rank = (rankdata(scores) - 1) / max(count - 1, 1)
    suspicion = ((rank - (1 - _SUSPICIOUS)) / _SUSPICIOUS).clip(0, 1)
    for image, keep in (answers or {}).items():
        suspicion[image] = not keep
    others = _from_the_others(features, suspicion)
    return others, _explained(others, suspicion)


def _from_the_others(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What ridge regression on the other images predicts for each image, ``[N]``."""
    spread = features.std(0)
    x = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
    gram = x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1])
    smoother = np.linalg.solve(gram, x.T).T
    leverage = (smoother * x).sum(1)
    # The mean is that of all: without its own share, an image would look the less suspicious the more it is.
    centred = target - target.mean()
    return (smoother @ (x.T @ centred) - leverage * centred) / np.maximum(1 - leverage, 1e-6)


def _explained(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Explained over unexplained variance, in [0, 1]; 0 where the two disagree or do not vary."""
    if min(np.ptp(prediction), np.ptp(truth)) == 0:
        return 0.0
    explained = max(np.corrcoef(prediction, truth)[0, 1], 0.0) ** 2
    return float(min(explained / max(1 - explained, 1e-6), 1.0))
