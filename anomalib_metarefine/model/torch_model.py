"""The exportable network: backbone, patch embedding, density, image score and anomaly map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from anomalib.data import InferenceBatch
from torch import nn

from anomalib_metarefine.density.flow import PatchFlow, position_code
from anomalib_metarefine.density.scorer import PatchScorer
from anomalib_metarefine.features.backbone import Backbone
from anomalib_metarefine.features.embedding import image_score, patch_embeddings
from anomalib_metarefine.features.resize import ExactResize
from anomalib_metarefine.images.regions import looked_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from anomalib_metarefine.density.patch_density import PatchDensity


class MetaRefineModel(nn.Module):
    """Scores images by their least likely patches.

    Attributes:
        ignored (np.ndarray | None): Mask of regions, see `looked_at`: what lies in them is left out from the first
            image that is embedded on.

    Args:
        backbone (str): timm architecture.
        layers (Sequence[str] | None): See `Backbone`.
        pre_trained (bool): See `Backbone`.
        dimensions (int): Channels of a whitened patch; at most the backbone's.
        blocks (int): Coupling blocks of the flow.
        hidden (int): Width of the coupling networks.
        tail (float): Share of the patches that make the image score.
    """

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
        self.scorer = PatchScorer(tail)
        self.tail = tail
        self.ignored: np.ndarray | None = None
        for name in ("places", "patch_at"):  # see `_ignore`
            self.register_buffer(name, torch.empty(0, dtype=torch.long))

    @property
    def looked(self) -> np.ndarray | None:
        """``[rows * columns]`` mask of the places that are looked at; ``None`` if all are."""
        return (self.patch_at < len(self.places)).cpu().numpy() if len(self.places) else None

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Patch embeddings ``[B x P x C]`` of normalised images ``[B x 3 x H x W]``, and the grid of patches."""
        maps = self.backbone(images)
        grid = tuple(maps[-1].shape[-2:])
        if self.ignored is not None and self.looked is None:
            self._ignore(looked_at(self.ignored, grid))
        return self._looked_at(patch_embeddings(maps)), grid

    def load_density(self, density: PatchDensity, grid: tuple[int, int]) -> None:
        """Take over a fitted density.

        Args:
            density (PatchDensity): Whitening, Gaussians and flow parameters.
            grid (tuple[int, int]): Rows and columns of patches it was fitted on.
        """
        # First the permutations of its flow, which are no parameters that learn.
        self.flow.load_state_dict(density.flow.state_dict())
        self.flow.load_state_dict({name: value.detach() for name, value in density.parameters.items()}, strict=False)
        positions = self._looked_at(position_code(*grid).unsqueeze(0)).squeeze(0)
        self.scorer.load(density, self.flow, positions)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Raw anomaly scores.

        Args:
            images (torch.Tensor): ``[B x 3 x H x W]``, normalised.

        Returns:
            InferenceBatch: ``pred_score`` ``[B]`` and ``anomaly_map`` ``[B x 1 x H x W]``, both in bits per dimension;
                of a model of parts that lie anywhere, distances, see `PatchMemory`.

        Raises:
            RuntimeError: If the model has not been fitted.
            ValueError: If the images have another size than those it was fitted on.
        """
        if self.scorer.patches == 0:
            msg = "This MetaRefine model has not been fitted. Train it (`anomalib train`) or load a checkpoint."
            raise RuntimeError(msg)
        maps = self.backbone(images)
        height, width = maps[-1].shape[-2:]
        fitted_on = len(self.patch_at) or self.scorer.patches
        if height * width != fitted_on:
            msg = (
                f"Images of {tuple(images.shape[-2:])} pixels give {height} x {width} patches, but the model was "
                f"fitted on {fitted_on}. Keep the pre-processor of the training, or train with this size."
            )
            raise ValueError(msg)
        bits = self.scorer(self._looked_at(patch_embeddings(maps)))
        score = image_score(bits, self.tail)
        if len(self.places):  # the least of an image stands for what is ignored: no part of its map is lower
            bits = torch.cat([bits, bits.amin(1, keepdim=True)], dim=1).index_select(1, self.patch_at)
        # Enlarging is what ExactResize does with fewer pixels than asked for, and two products are faster in OpenVINO
        # than its interpolation.
        enlarge = ExactResize(tuple(images.shape[-2:]))
        anomaly_map = enlarge(bits.view(-1, 1, height, width))
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def _ignore(self, looked: np.ndarray) -> None:
        """Leave places out: of the grid's ``[rows * columns]``, those outside of a mask."""
        mask = torch.from_numpy(looked).to(self.places.device)
        self.places = mask.nonzero().flatten()
        self.patch_at = torch.where(mask, mask.cumsum(0) - 1, len(self.places))  # one past the last where ignored

    def _looked_at(self, patches: torch.Tensor) -> torch.Tensor:
        """Of ``[B x rows * columns x C]``, the patches that are not ignored, ``[B x P x C]``."""
        return patches.index_select(1, self.places.to(patches.device)) if len(self.places) else patches

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        """Take the number of places from the checkpoint."""
        for name in ("places", "patch_at"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *args)
