"""Regions that a model of anomalib ignores once it is trained; MetaRefine leaves them out of its training already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from anomalib.data import InferenceBatch
from torch import nn

from anomalib_metarefine.features.extract import image_tensor
from anomalib_metarefine.images.regions import as_text, looked_at, read_regions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anomalib.models import AnomalibModule

_TOLD = (16, 16)  # rows and columns of what metadata.json says
_TRIED = 8  # images


class Ignoring(nn.Module):
    """A model whose map is at its lowest in some regions, and whose score is the highest of its map.

    Args:
        model (nn.Module): Makes the map.
        ignored (torch.Tensor): ``[H, W]`` bool, of the size of the map.
    """

    ignored: torch.Tensor

    def __init__(self, model: nn.Module, ignored: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("ignored", ignored)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Scores ``[B]`` and maps ``[B x 1 x H x W]`` of images."""
        found = self.model(images).anomaly_map
        anomaly_map = torch.where(self.ignored, found.amin((2, 3), keepdim=True), found)
        return InferenceBatch(pred_score=anomaly_map.amax((1, 2, 3)), anomaly_map=anomaly_map)


@torch.no_grad()
def ignore_regions(model: AnomalibModule, file: str | Path, paths: Sequence[str | Path]) -> None:
    """Have a trained model ignore regions, here and in what is exported of it.

    Args:
        model (AnomalibModule): Its ``model`` is put into an `Ignoring`.
        file (str | Path): See `read_regions`.
        paths (Sequence[str | Path]): Some images, to see whether its score is the highest of its map.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the score is another, or see `read_regions` and `looked_at`.
    """
    regions = read_regions(file)
    name = type(model).__name__
    if hasattr(model, "refinement"):
        msg = f"{name} leaves regions out of its training, too. Train it with them (--model.ignore, train --ignore)."
        raise ValueError(msg)
    transform = getattr(model.pre_processor, "transform", None) or (lambda image: image)
    if not paths:
        msg = f"To leave regions out of {name}, its threshold must be chosen anew, on images. Pass them (--data)."
        raise ValueError(msg)
    images = torch.stack([transform(image_tensor(path, getattr(model, "bit_depth", None))) for path in paths[:_TRIED]])
    found = model.eval().model(images.to(model.device))
    highest = None if found.anomaly_map is None else found.anomaly_map.amax((1, 2, 3)).cpu().numpy()
    if highest is None or not np.allclose(found.pred_score.flatten().cpu().numpy(), highest, rtol=1e-4):
        msg = (
            f"Regions can't be left out of {name}: its image score is not the highest score of its map, so what it "
            "owes to them is not known. PaDiM, FastFlow, STFPM and MetaRefine can ignore regions."
        )
        raise ValueError(msg)
    size = tuple(found.anomaly_map.shape[-2:])
    ignored = torch.from_numpy(~looked_at(regions, size)).view(size)
    model.model = Ignoring(model.model, ignored.to(model.device))
    model.provenance = {**getattr(model, "provenance", {}), "ignored": as_text(looked_at(regions, _TOLD), _TOLD)}
