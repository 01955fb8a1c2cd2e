"""Patch embeddings: feature maps brought to one grid, whitened over the whole training set, then position by position.

A frozen backbone gives one vector per patch. Two linear maps turn it into something a density can be learned on:

1. *global whitening* (`Whitening`): principal components over all patches of all images, scaled to unit variance;
2. *positional whitening* (`PositionalGaussian`): mean and covariance of each grid position, as in PaDiM, shrunk
   towards the pooled covariance. On aligned parts this alone is worth 8 points of image AUROC (``docs/results.md``),
   and it is cheap enough to be fitted again in every refinement round.

References:
    - Defard et al., "PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization",
      arXiv 2011.08785.
    - Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn import functional as F

_EIGENVALUE_FLOOR = 1e-3  # of the largest: components below it are mostly noise of the backbone
_VARIANCE_FLOOR = 1e-6  # of a component, in the units of the backbone: flat images have no variance at all
_MIN_REMAINING = 0.05  # of the determinant, when one image is taken out: the approximation ends before zero
_RIDGE = 1e-3  # added to every positional covariance (unit scale after whitening): flat images have none


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


class Whitening(NamedTuple):
    """Global whitening ``x -> (x - mean) @ projection``.

    Attributes:
        mean (torch.Tensor): ``[C]``.
        projection (torch.Tensor): ``[C x D]``, principal axes divided by their standard deviation.
    """

    mean: torch.Tensor
    projection: torch.Tensor

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


class PositionalGaussian(NamedTuple):
    """Mean and covariance of each grid position, ``z = L^-1 (x - mean)`` with ``L L^T`` the shrunk covariance.

    Attributes:
        mean (torch.Tensor): ``[P x D]``.
        precision_root (torch.Tensor): ``L^-1``, ``[P x D x D]``, lower triangular.
        log_det (torch.Tensor): ``log |L^-1|``, ``[P]``: what the map adds to a log-likelihood.
        count (torch.Tensor): Patches that each position was fitted on, ``[P]``.
        shrinkage (float): Weight of the pooled covariance.
    """

    mean: torch.Tensor
    precision_root: torch.Tensor
    log_det: torch.Tensor
    count: torch.Tensor
    shrinkage: float

    @classmethod
    def fit(
        cls, chunks: Iterable[torch.Tensor], shrinkage: float, learned: torch.Tensor | None = None
    ) -> PositionalGaussian:
        """Fit on the whitened patches of a set of images, read once, chunk by chunk.

        Args:
            chunks (Iterable[torch.Tensor]): ``[n x P x D]`` each, at least one image in all. One image is enough: the
                spread then comes from the pooled covariance alone.
            shrinkage (float): Weight of the pooled covariance in every position's own, in [0, 1].
            learned (torch.Tensor | None): ``[N x P]`` mask of the patches to learn from, for the images of all chunks
                in order, with at least one patch of every position; ``None`` learns from all.

        Returns:
            PositionalGaussian: The fitted map.
        """
        first, count, total, outer = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
        for chunk in chunks:
            by_position = chunk.transpose(0, 1)  # [P x n x D]
            if learned is not None:
                by_position = by_position * learned[first : first + len(chunk)].T.unsqueeze(2)
                count = count + learned[first : first + len(chunk)].sum(0)
            else:
                count = count + chunk.new_full((chunk.shape[1],), len(chunk))
            first += len(chunk)
            total = total + by_position.sum(1)
            outer = outer + by_position.transpose(1, 2) @ by_position
        times = count.view(-1, 1, 1)
        mean = total / times.squeeze(2)
        own = (outer - times * mean.unsqueeze(2) * mean.unsqueeze(1)) / (times - 1).clamp_min(1)
        centre = total.sum(0) / count.sum()
        pooled = outer.sum(0) / count.sum() - torch.outer(centre, centre)
        covariance = torch.lerp(own, pooled.expand_as(own), torch.where(times > 1, shrinkage, 1.0).to(own))
        covariance.diagonal(dim1=1, dim2=2).add_(_RIDGE)
        root = torch.linalg.cholesky(covariance)
        identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
        inverse = torch.linalg.solve_triangular(root, identity, upper=False)
        log_det = -root.diagonal(dim1=1, dim2=2).log().sum(1)
        return cls(mean, inverse, log_det, count, shrinkage)

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Whiten ``[N x P x D]`` position by position, to the same shape."""
        centred = (patches - self.mean).transpose(0, 1)
        return (centred @ self.precision_root.transpose(1, 2)).transpose(0, 1)

    def leave_one_out(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the map would have given had each image not been in the set it was fitted on.

        An image pulls mean and covariance towards itself, so the distances of training images all look alike. Taking
        it out of a sample covariance of ``n`` images is a rank-one downdate: with ``a = (1 - shrinkage) n / (n - 1)^2``
        and ``d2 = |z|^2``, the squared distance becomes ``d2 / (1 - a d2)`` and the determinant shrinks by ``1 - a d2``
        (Sherman-Morrison); the distance to the mean of the others is ``n / (n - 1)`` times as long, and the covariance
        of one image fewer has another divisor. The pooled covariance and the direction of ``z`` are left as they are.

        Args:
            z (torch.Tensor): ``[N x P x D]``, output of the map for images it was fitted on.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Corrected ``z``, and ``[N x P]`` corrected log-determinants.
        """
        if self.count.min() < 3:
            return z, self.log_det.expand(z.shape[:2])
        leverage = (1 - self.shrinkage) * self.count / (self.count - 1).square()
        divisor = 1 + (1 - self.shrinkage) / (self.count - 2)
        remaining = (1 - leverage * z.square().sum(-1)).clamp_min(_MIN_REMAINING)
        stretch = self.count / (self.count - 1) * (divisor * remaining).rsqrt()
        log_det = self.log_det - 0.5 * remaining.log() - 0.5 * z.shape[-1] * divisor.log()
        return z * stretch.unsqueeze(-1), log_det
