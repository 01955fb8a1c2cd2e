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

from anomalib_metarefine.refinement.fitting import Images, whitened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anomalib_metarefine.features.embedding import Whitening
    from anomalib_metarefine.features.shards import Shard
    from anomalib_metarefine.features.store import FeatureStore

_SUSPICIOUS = 0.2  # share of the images that are taken for suspicious, ever more so towards the highest score
_RIDGE = 10.0  # penalty, in variances of one feature over the images; 1 to 30 hardly differ
_NO_VARIANCE = 1e-12  # of the mean square: less is rounding
FEWEST_IMAGES = 20  # fewer were not tried


def keep_deviations(images: Images, kept: np.ndarray, variants: np.ndarray) -> None:
    """What is unusual about each image: how its unusual patches differ from the mean patch of their place.

    The mean is that of the own variant; of all images where nothing of that is kept. Patches count by the square of
    what their distance has above the median of their image. Shards keep the result as ``deviations``, ``[N x D]``.

    Args:
        images (Images): All images; their shards have ``distances``, how unusual each patch is.
        kept (np.ndarray): ``[N]`` mask of the images that count as normal.
        variants (np.ndarray): ``[N]`` number of each image's variant.
    """
    count = int(variants.max()) + 1
    (totals,) = images.store.total(_seen, (images.whitening, count), kept, variants)
    kept_of = torch.from_numpy(np.bincount(variants[kept], minlength=count)).view(-1, 1, 1)
    usual = torch.where(kept_of > 0, totals / kept_of.clamp_min(1), totals.sum(0) / kept_of.sum())
    images.store.map(_deviations, usual.float(), variants)


def likeness(
    store: FeatureStore, scores: Sequence[np.ndarray], answers: Mapping[int, bool] | None = None
) -> list[tuple[np.ndarray, float]]:
    """How suspicious every image looks to a linear model of the other images, and how far that is to be trusted.

    Args:
        store (FeatureStore): Its shards have ``deviations``, ``[N x D]``.
        scores (Sequence[np.ndarray]): One or several scores ``[N]``, higher is more anomalous; only their order counts.
        answers (Mapping[int, bool] | None): Images that a person has decided to keep (true) or to reject.

    Returns:
        list[tuple[np.ndarray, float]]: By each of the scores: ``[N]``, higher is more suspicious; and what the model
            explains of the others' suspicion over what it doesn't, in variances, at most 1. Where parts lie anywhere
            it explains little.
    """
    suspicion = np.stack([_suspicion(one, answers or {}) for one in scores], 1)
    others = _from_the_others(store, suspicion)
    return [(one, _explained(one, truth)) for one, truth in zip(others.T, suspicion.T, strict=True)]


def _suspicion(scores: np.ndarray, answers: Mapping[int, bool]) -> np.ndarray:
    rank = (rankdata(scores) - 1) / max(len(scores) - 1, 1)
    suspicion = ((rank - (1 - _SUSPICIOUS)) / _SUSPICIOUS).clip(0, 1)
    for image, keep in answers.items():
        suspicion[image] = not keep
    return suspicion


def _from_the_others(store: FeatureStore, target: np.ndarray) -> np.ndarray:
    """What ridge regression on the other images predicts for each image, ``[N x T]``."""
    # The mean is that of all: without its own share, an image would look the less suspicious the more it is.
    centred, count = target - target.mean(0), len(target)
    total, products, cross = (part.numpy() for part in store.total(_moments, None, centred))
    mean, square = total / count, products.diagonal() / count
    variance = square - mean**2
    spread = np.sqrt(np.where(variance > _NO_VARIANCE * square, variance, 1))
    gram = (products - count * np.outer(mean, mean)) / np.outer(spread, spread)
    inverse = np.linalg.inv(gram + _RIDGE * count * np.eye(len(gram)))
    weights = inverse @ ((cross - np.outer(mean, centred.sum(0))) / spread[:, None])
    return store.per_image(_predicted, (mean, spread, inverse, weights), centred)


def _explained(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Explained over unexplained variance, in [0, 1]; 0 where the two disagree or do not vary."""
    if min(np.ptp(prediction), np.ptp(truth)) == 0:
        return 0.0
    explained = max(np.corrcoef(prediction, truth)[0, 1], 0.0) ** 2
    return float(min(explained / max(1 - explained, 1e-6), 1.0))


def _weights(shard: Shard) -> torch.Tensor:
    """How much each patch counts, ``[n x P]``."""
    distances = torch.from_numpy(shard.read("distances"))
    weights = (distances - distances.median(1, keepdim=True).values).clamp_min(0).square()
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


@torch.no_grad()
def _seen(shard: Shard, shared: tuple[Whitening, int], kept: np.ndarray, variants: np.ndarray) -> tuple[torch.Tensor]:
    """Sums of the kept patches of every place, variant by variant ``[V x P x D]``; keeps weighted means ``seen``."""
    whitening, count = shared
    weights, totals = _weights(shard), torch.zeros(())
    seen: list[torch.Tensor] = []
    for rows, patches in whitened(shard, whitening):
        if not seen:
            totals = torch.zeros(count, *patches.shape[1:])
        seen.append(torch.einsum("np,npd->nd", weights[rows], patches))
        for variant in np.unique(variants[rows]):
            own = kept[rows] & (variants[rows] == variant)
            totals[variant] += patches[torch.from_numpy(own)].sum(0)
    shard.write(seen=torch.cat(seen).numpy())
    return (totals,)


@torch.no_grad()
def _deviations(shard: Shard, usual: torch.Tensor, variants: np.ndarray) -> None:
    weights, unusual = _weights(shard), torch.from_numpy(shard.read("seen").copy())
    for variant in np.unique(variants):
        own = torch.from_numpy(variants == variant)
        unusual[own] -= weights[own] @ usual[variant]
    shard.write(deviations=unusual.numpy())


def _moments(shard: Shard, _shared: None, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    features = shard.read("deviations").astype(np.float64)
    return features.sum(0), features.T @ features, features.T @ target


def _predicted(
    shard: Shard, model: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], target: np.ndarray
) -> np.ndarray:
    mean, spread, inverse, weights = model
    x = (shard.read("deviations") - mean) / spread
    leverage = ((x @ inverse) * x).sum(1)[:, None]
    return (x @ weights - leverage * target) / np.maximum(1 - leverage, 1e-6)
