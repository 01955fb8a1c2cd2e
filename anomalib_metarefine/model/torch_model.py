"""The exportable network: backbone, patch embedding, whitening, flow, scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components.base.dynamic_buffer import DynamicBufferMixin
from torch import nn
from torch.nn import functional as F

from anomalib_metarefine.density.flow import PatchFlow, bits_per_dimension, image_score, position_code
from anomalib_metarefine.features.backbone import Backbone
from anomalib_metarefine.features.embedding import patch_embeddings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.model.fitting import Density


class MetaRefineModel(DynamicBufferMixin, nn.Module):
    """Scores images by the negative log-likelihood of their least likely patches.

    Global and positional whitening are stored multiplied out, one ``[C x D]`` matrix per grid position.

    Args:
        backbone (str): timm architecture.
        layers (Sequence[str] | None): See `Backbone`.
        pre_trained (bool): See `Backbone`.
        dimensions (int): Channels of a whitened patch; at most the backbone's.
        blocks (int): Coupling blocks of the flow.
        hidden (int): Width of the coupling networks.
        tail (float): Share of the patches that make the image score.
    """

    projection: torch.Tensor  # [P x C x D]
    offset: torch.Tensor  # [P x D]
    log_det: torch.Tensor  # [P]
    positions: torch.Tensor  # [P x 16]

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        dimensions: int = 128,
        blocks: int = 4,
        hidden: int = 64,
        tail: float = 0.03,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(backbone, layers, pre_trained)
        self.flow = PatchFlow(min(dimensions, sum(self.backbone.channels)), blocks, hidden)
        self.tail = tail
        for name in ("projection", "offset", "log_det", "positions"):
            self.register_buffer(name, torch.empty(0))

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Patch embeddings ``[B x P x C]`` of normalised images ``[B x 3 x H x W]``, and the grid of patches."""
        maps = self.backbone(images)
        return patch_embeddings(maps), tuple(maps[-1].shape[-2:])

    def load_density(self, density: Density, grid: tuple[int, int]) -> None:
        """Take over a fitted density.

        Args:
            density (Density): Whitening and flow parameters.
            grid (tuple[int, int]): Rows and columns of patches it was fitted on.
        """
        whitening, gaussian = density.whitening, density.gaussian
        device = self.projection.device
        projection = whitening.projection @ gaussian.precision_root.transpose(1, 2)
        shift = whitening.mean @ whitening.projection + gaussian.mean
        self.projection = projection.to(device)
        self.offset = (gaussian.precision_root @ shift.unsqueeze(2)).squeeze(2).to(device)
        self.log_det = gaussian.log_det.to(device)
        self.positions = position_code(*grid).to(device)
        self.flow.load_state_dict({name: value.detach() for name, value in density.parameters.items()}, strict=False)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Raw anomaly scores.

        Args:
            images (torch.Tensor): ``[B x 3 x H x W]``, normalised.

        Returns:
            InferenceBatch: ``pred_score`` ``[B]`` and ``anomaly_map`` ``[B x 1 x H x W]``, both in bits per dimension.

        Raises:
            RuntimeError: If the model has not been fitted.
            ValueError: If the images have another size than those it was fitted on.
        """
        if self.projection.numel() == 0:
            msg = "This MetaRefine model has not been fitted. Train it (`anomalib train`) or load a checkpoint."
            raise RuntimeError(msg)
        maps = self.backbone(images)
        height, width = maps[-1].shape[-2:]
        embeddings = patch_embeddings(maps)
        if embeddings.shape[1] != len(self.positions):
            msg = (
                f"Images of {tuple(images.shape[-2:])} pixels give {height} x {width} patches, but the model was "
                f"fitted on {len(self.positions)}. Keep the pre-processor of the training, or train with this size."
            )
            raise ValueError(msg)
        z = (embeddings.transpose(0, 1) @ self.projection).transpose(0, 1) - self.offset
        count = images.shape[0]  # not len(), which would fix the batch size of an exported graph
        output, log_det = self.flow(z.flatten(0, 1), self.positions.repeat(count, 1))
        bits = bits_per_dimension(output.view_as(z), log_det.view(count, -1) + self.log_det)
        anomaly_map = F.interpolate(
            bits.view(count, 1, height, width), size=images.shape[-2:], mode="bilinear", align_corners=False
        )
        return InferenceBatch(pred_score=image_score(bits, self.tail), anomaly_map=anomaly_map)
