"""Patches to which those of a new image are compared, wherever they lie: for parts that lie anywhere.

Farthest-first: each is the patch of the training images that is farthest from those taken so far. A random draw would
take the usual ones again and again and leave rare ones out, and every image has some that are rare: of 150 images of
MVTec AD `screw`, 3,000 patches drawn at random give an image AUROC of 77 to 83, farthest-first ones of 90.

References:
    - Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985 (farthest-first).
    - Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), arXiv 2106.08265.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_PATCHES = 3000  # 500 lose 8 points of AUROC on `screw`, 6,000 gain none
_DIMENSIONS = 32  # of a random projection, in which distances are nearly kept


class PatchMemory(NamedTuple):
    """``M`` whitened patches of ``D`` channels."""

    patches: torch.Tensor  # [M x D]
    images: torch.Tensor  # [M] number of the training image that each is of

    @classmethod
    def fit(cls, patches: torch.Tensor, images: torch.Tensor, generator: torch.Generator) -> PatchMemory:
        """Farthest-first patches of training images.

        Args:
            patches (torch.Tensor): ``[T x D]``, globally whitened.
            images (torch.Tensor): ``[T]`` number of the image of each.
            generator (torch.Generator): Of the first one and of the projection.
        """
        chosen = farthest_first(patches, _PATCHES, generator)
        return cls(patches[chosen], images[chosen])

    def distances(self, whitened: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Distance of patches to the nearest one of another image, see `nearest`.

        Args:
            whitened (torch.Tensor): ``[n x P x D]``.
            own (torch.Tensor): ``[n]`` number of each image; one that no patch is of if it is new.

        Returns:
            torch.Tensor: ``[n x P]``.
        """
        found = [
            nearest(patches, self.patches if number < 0 else self.patches[self.images != number])
            for patches, number in zip(whitened, own.tolist(), strict=True)
        ]
        return torch.stack(found)


def farthest_first(patches: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of up to ``count`` of the patches ``[T x D]``, the farthest from those before first.

    Example:
        >>> patches = torch.tensor([[0.0], [0.1], [9.0]])
        >>> int(2 in farthest_first(patches, 2, torch.Generator().manual_seed(0)))
        1
    """
    projection = torch.randn(patches.shape[1], _DIMENSIONS, generator=generator) / _DIMENSIONS**0.5
    projected = patches @ projection
    norms = projected.square().sum(1)
    left = torch.full((len(patches),), float("inf"))
    chosen = torch.empty(min(count, len(patches)), dtype=torch.long)
    farthest = int(torch.randint(len(patches), (), generator=generator))
    for i in range(len(chosen)):
        chosen[i] = farthest
        left = torch.minimum(left, norms - 2 * (projected @ projected[farthest]) + norms[farthest])
        farthest = int(left.argmax())
    return chosen


def nearest(patches: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest of ``[M x D]``, in spreads of a channel: ``[... x D]`` to ``[...]``."""
    squared = memory.square().sum(-1) - 2 * (patches @ memory.T)
    squared = squared.amin(-1) + patches.square().sum(-1)
    return (squared.clamp_min(0) / memory.shape[-1]).sqrt()
