"""Synthetic anomalies in image space: some training images are spoilt, and the patches under the damage remembered.

They cost a pass of the backbone over 32 more images. `meta.episodes` makes cheaper ones in feature space.

References:
    - Zavrtanik et al., "DRAEM", arXiv 2108.07610 (Perlin noise; anomalib's generator).
    - Li et al., "CutPaste", arXiv 2104.04015.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KINDS = ("features", "perlin", "cutpaste")
_IMAGES = 32  # that are spoilt; each gives tens of patches
_COVERED = 0.25  # share of a patch under the damage from which on it is anomalous
_AREA = (0.02, 0.15)  # of a pasted rectangle, as a share of the image's; as in the paper
_ASPECT = (0.3, 3.3)


class SyntheticAnomalies:
    """Anomalous patches of the first training images that pass by.

    Args:
        kind (str): ``"perlin"`` or ``"cutpaste"``.
        mean (Sequence[float]): By which images were normalised, per channel.
        std (Sequence[float]): The same.
    """

    def __init__(self, kind: str, mean: Sequence[float], std: Sequence[float]) -> None:
        self._spoil = {"perlin": PerlinAnomalyGenerator(probability=1.0), "cutpaste": cut_and_paste}[kind]
        self._mean, self._std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self._missing = _IMAGES
        self._embeddings: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []

    def add(self, images: torch.Tensor, embed: Callable[[torch.Tensor], tuple[torch.Tensor, tuple[int, int]]]) -> None:
        """Spoil as many of the images as are still missing.

        Args:
            images (torch.Tensor): ``[B x 3 x H x W]``, normalised.
            embed (Callable): Gives patch embeddings ``[B x P x C]`` and the grid of patches of such images.
        """
        chosen = images[: self._missing]
        if len(chosen) == 0:
            return
        self._missing -= len(chosen)
        mean, std = self._mean.to(images.device), self._std.to(images.device)
        spoilt, masks = self._spoil((chosen * std + mean).clamp(0, 1))
        embeddings, grid = embed((spoilt - mean) / std)
        anomalous = F.adaptive_avg_pool2d(masks, grid).flatten(1) > _COVERED
        self._embeddings.append(embeddings[anomalous].cpu())
        self._places.append(anomalous.nonzero()[:, 1].cpu())

    def patches(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to ``count`` of the anomalous patches: embeddings ``[K x C]`` and their places in the grid, ``[K]``."""
        embeddings, places = torch.cat(self._embeddings), torch.cat(self._places)
        chosen = torch.randperm(len(places), generator=generator)[:count]
        return embeddings[chosen], places[chosen]


def cut_and_paste(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy a random rectangle of each image to another place of it.

    Args:
        images (torch.Tensor): ``[B x C x H x W]``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: The spoilt images, and the mask of the damage ``[B x 1 x H x W]``.
    """
    count, _, height, width = images.shape
    spoilt, masks = images.clone(), images.new_zeros(count, 1, height, width)
    for image, result, mask in zip(images, spoilt, masks, strict=True):
        area = height * width * torch.empty(()).uniform_(*_AREA).item()
        aspect = math.exp(torch.empty(()).uniform_(math.log(_ASPECT[0]), math.log(_ASPECT[1])).item())
        rows = max(1, min(height, round(math.sqrt(area * aspect))))
        columns = max(1, min(width, round(math.sqrt(area / aspect))))
        top, to_top = torch.randint(height - rows + 1, (2,)).tolist()
        left, to_left = torch.randint(width - columns + 1, (2,)).tolist()
        result[:, to_top : to_top + rows, to_left : to_left + columns] = image[
            :, top : top + rows, left : left + columns
        ]
        mask[:, to_top : to_top + rows, to_left : to_left + columns] = 1
    return spoilt, masks
