"""PatchCore that denoises its patches, after SoftPatch: a comparison that also means to learn from dirty training sets.

What differs from the authors' code: anomalib's PatchCore is what lies beneath, with its backbone, its pooling, its
re-weighting of the image score by neighbours in the memory (they take the largest patch score), and its random
projection for the coreset alone (they look for outliers in projected patches, too). The size of the coreset is a
share of the patches that are left, not of all.

References:
    Jiang et al., "SoftPatch: Unsupervised Anomaly Detection with Noisy Data", NeurIPS 2022, arXiv 2403.14233.
    Breunig et al., "LOF: Identifying Density-Based Local Outliers", SIGMOD 2000.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from anomalib.metrics import Evaluator
from anomalib.models import Patchcore
from anomalib.models.components import KCenterGreedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from sklearn.neighbors import LocalOutlierFactor

from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from studies.baselines.patchcore import QuickPatchcore


class SoftPatch(QuickPatchcore):
    """PatchCore whose memory leaves the most outlying training patches out and trusts the others by degrees.

    Every patch gets a local outlier factor among the patches of all training images at its grid position. The worst
    are dropped before the coreset is chosen; at test time, a patch's distance to its nearest neighbour in the memory
    is multiplied by the factor of that neighbour.

    Args:
        backbone (str): timm architecture.
        layers (Sequence[str]): Modules of it to read.
        pre_trained (bool): Load pretrained weights.
        coreset_sampling_ratio (float): Share of the remaining patches that the memory keeps.
        num_neighbors (int): See `Patchcore`; 1 takes the largest patch score, as the authors do.
        lof_neighbors (int): Neighbours of the outlier factor.
        noise_share (float): Share of the patches that are dropped, in [0, 1).
        pre_processor (PreProcessor | bool): See anomalib.
        post_processor (PostProcessor | bool): See anomalib.
        evaluator (Evaluator | bool): See anomalib.
        visualizer (Visualizer | bool): See anomalib.

    Raises:
        ValueError: If ``noise_share`` or ``lof_neighbors`` is out of range.
    """

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        layers: Sequence[str] = ("blocks.2", "blocks.4"),
        pre_trained: bool = True,
        coreset_sampling_ratio: float = 0.1,
        num_neighbors: int = 9,
        lof_neighbors: int = 6,
        noise_share: float = 0.15,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if not 0 <= noise_share < 1:
            msg = f"noise_share must be a share in [0, 1), found {noise_share}."
            raise ValueError(msg)
        if lof_neighbors < 1:
            msg = f"lof_neighbors must be an integer of at least 1, found {lof_neighbors}."
            raise ValueError(msg)
        # Patchcore's own constructor would build PatchcoreModel.
        super(Patchcore, self).__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model = SoftPatchModel(layers, backbone, pre_trained, num_neighbors, lof_neighbors, noise_share)
        self.coreset_sampling_ratio = coreset_sampling_ratio


class SoftPatchModel(PatchcoreModel):
    """`PatchcoreModel` with a denoised, weighted memory; its `forward` is inherited.

    Attributes:
        memory_weights (torch.Tensor): ``[M]``, local outlier factor of every patch in the memory.
    """

    def __init__(
        self,
        layers: Sequence[str],
        backbone: str,
        pre_trained: bool,
        num_neighbors: int,
        lof_neighbors: int,
        noise_share: float,
    ) -> None:
        super().__init__(list(layers), backbone, pre_trained, num_neighbors)
        self.lof_neighbors, self.noise_share = lof_neighbors, noise_share
        self.register_buffer("memory_weights", torch.empty(0))
        self.memory_weights: torch.Tensor

    def generate_embedding(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """PatchCore's embedding ``[B x C x H x W]``; its grid is needed to know the position of a patch."""
        embedding = super().generate_embedding(features)
        self._positions = embedding.shape[-2:].numel()
        return embedding

    def subsample_embedding(self, sampling_ratio: float) -> None:
        """Drop the outlying patches and make a coreset of the others.

        Args:
            sampling_ratio (float): Share of the others to keep.
        """
        patches = torch.vstack(self.embedding_store)  # [N * P x C], image by image
        self.embedding_store.clear()
        by_position = patches.view(-1, self._positions, patches.shape[1]).transpose(0, 1)
        found = np.stack([local_outlier_factors(part, self.lof_neighbors) for part in by_position.cpu().numpy()], 1)
        factors = torch.from_numpy(found).to(patches).flatten()
        clean = factors <= factors.kthvalue(max(1, math.ceil((1 - self.noise_share) * len(factors)))).values
        patches, factors = patches[clean], factors[clean]
        chosen = KCenterGreedy(patches, sampling_ratio).select_coreset_idxs()
        self.memory_bank, self.memory_weights = patches[chosen], factors[chosen]

    def nearest_neighbors(self, embedding: torch.Tensor, n_neighbors: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances ``[n x k]`` to the nearest patches in the memory, times their factors, and which ones they are."""
        distances, places = super().nearest_neighbors(embedding, n_neighbors)
        return distances * self.memory_weights[places], places


def local_outlier_factors(points: np.ndarray, neighbors: int) -> np.ndarray:
    """How much thinner the surroundings of a point are than those of its neighbours.

    Args:
        points (np.ndarray): ``[N x C]``.
        neighbors (int): Number of neighbours that make the surroundings; at most the other points.

    Returns:
        np.ndarray: ``[N]``, about 1 for inliers; exactly 1 for a single point.
    """
    neighbors = min(neighbors, len(points) - 1)
    if neighbors == 0:
        return np.ones(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate values")  # of flat images, say
        return -LocalOutlierFactor(n_neighbors=neighbors).fit(points).negative_outlier_factor_
