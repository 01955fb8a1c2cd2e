"""Patch embeddings: feature maps brought to one grid, and whitened over the whole training set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

_EIGENVALUE_FLOOR = 1e-3  # of the largest: components below it are mostly noise of the backbone
_VARIANCE_FLOOR = 1e-6  # of a component, in the units of the backbone: flat images have no variance at all


def patch_embeddings(maps: list[torch.Tensor], grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Bring feature maps to one grid and concatenate their channels.

    Args:
        maps (list[torch.Tensor]): ``[B x C_l x H_l x W_l]``, finest first.
        grid (tuple[int, int] | None): Rows and columns; ``None`` takes those of the coarsest map.

    Returns:
        torch.Tensor: ``[B x P x C]`` with ``P = H * W`` patches in row-major order and ``C`` the sum of channels.

    Example:
        >>> maps = [torch.zeros(2, 40, 8, 20), torch.zeros(2, 112, 4, 10)]
        >>> tuple(patch_embeddings(maps).shape)
        (2, 40, 152)
    """
    height, width = grid or tuple(maps[-1].shape[-2:])
    aligned = [_to_grid(m, height, width) for m in maps]
    return torch.cat(aligned, dim=1).flatten(2).transpose(1, 2)


def _to_grid(features: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Average-pool a finer map and interpolate a coarser one; both export as one plain operation."""
    rows, columns = features.shape[-2:]
    if (rows, columns) == (height, width):
        return features
    if rows % height == 0 and columns % width == 0:
        stride = (rows // height, columns // width)
        return F.avg_pool2d(features, kernel_size=stride, stride=stride)
    if rows >= height and columns >= width:
        return F.adaptive_avg_pool2d(features, (height, width))
    return F.interpolate(features, size=(height, width), mode="bilinear", align_corners=False)


def image_score(patch_scores: torch.Tensor, tail: float) -> torch.Tensor:
    """Mean of the highest patch scores of each image.

    A defect covers few patches; the mean over all of them loses 3 to 20 points of image AUROC.

    Args:
        patch_scores (torch.Tensor): ``[B x P]``.
        tail (float): Share of the patches that count, in (0, 1]; at least one does.

    Returns:
        torch.Tensor: ``[B]``.

    Example:
        >>> image_score(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), tail=0.5)
        tensor([3.5000])
    """
    count = max(1, round(tail * patch_scores.shape[-1]))
    return patch_scores.topk(count, dim=-1).values.mean(-1)


class Whitening(NamedTuple):
    """Global whitening ``x -> (x - mean) @ projection``."""

    mean: torch.Tensor  # [C]
    projection: torch.Tensor  # [C x D], principal axes divided by their standard deviation

    @classmethod
    def fit(cls, embeddings: torch.Tensor, dimensions: int) -> Whitening:
        """Principal components of patches.

        Args:
            embeddings (torch.Tensor): ``[M x C]``, ``M >= 2``.
            dimensions (int): Components to keep, at most ``C``.

        Returns:
            Whitening: Its output has zero mean and, above the eigenvalue floor, unit variance.
        """
        centre = embeddings.mean(0)
        values, axes = torch.linalg.eigh(torch.cov((embeddings - centre).T))
        values, axes = values.flip(0)[:dimensions], axes.flip(1)[:, :dimensions]
        floor = (_EIGENVALUE_FLOOR * values[0]).clamp_min(_VARIANCE_FLOOR)
        return cls(centre, axes / values.clamp_min(floor).sqrt())

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Whiten ``[... x C]`` to ``[... x D]``."""
        return (embeddings - self.mean) @ self.projection
