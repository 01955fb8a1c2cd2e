"""Patch nearest neighbours between images: is there another image in which this patch looks like this?

A defect is rare: in most other images there is nothing like it at its place, while normal patterns recur everywhere.
Drawing many small support sets and scoring each image by its distance to the nearest patch of each support (episodic
scoring) measures this; with the distance of every patch to *every single image* at hand, the score against any support
set is a minimum over its images, so no support has to be drawn at all. A patch is compared with the patches of a small
window around its own place: on aligned parts that is where its like is, on others it was measured to be as good as a
search of the whole image, at a tenth of the cost.

References:
    - Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), arXiv 2106.08265.
    - Xie et al., "Pushing the Limits of Few-Shot Anomaly Detection in Industry Vision: GraphCore", arXiv 2301.12082.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from anomalib_metarefine.features.embedding import image_score

if TYPE_CHECKING:
    from collections.abc import Callable

    from anomalib_metarefine.features.store import FeatureStore

_DIMENSIONS = 64  # principal components; 32 lost 4 points of AUROC on `screw`, more gained nothing
_CHUNK = 32  # images at a time
_FARTHEST = 65_000.0  # what half precision holds
_SAMPLE = 65_536  # patches that the principal components are computed from


class NearestImages:
    """For every patch, the reference images that come nearest to it, and how near.

    Args:
        store (FeatureStore): Embeddings of all images; results follow its order.
        grid (tuple[int, int]): Rows and columns of patches.
        seed (int): Of which images are references, where there are more than ``references``.
        window (int): Patches at most this far off, in rows and columns, are compared.
        references (int): Images compared with at most; cost and memory grow with them.
        nearest (int): References remembered for each patch. Where all of them are rejected later, the farthest stands
            for the rest, so that a patch never scores better for it.
        on_images (Callable[[int], None] | None): Told how many images were done since it was last called.
        variants (np.ndarray | None): ``[N]`` number of each image's variant, for their layouts; ``None`` if one.
        looked (np.ndarray | None): ``[rows * columns]`` mask of the places that the store has; ``None`` means all.
        rows (np.ndarray | None): ``[N]`` rows of the store of the images to compare; ``None`` compares all.
        axes (tuple[torch.Tensor, torch.Tensor] | None): Mean ``[C]`` of the patches and their principal axes
            ``[C x D]``, the first ones first; ``None`` finds them.

    Attributes:
        distances (np.ndarray): ``[N x P x K]`` half precision, ascending; infinite where there is no other image.
        images (np.ndarray): ``[N x P x K]``, rows of the store.
        axes (tuple[torch.Tensor, torch.Tensor]): As above, those that were compared along.
        layouts (np.ndarray): ``[V]`` share of the variance of the patches of each variant that their place explains,
            in [0, 1], from its references; NaN where it has none.
    """

    def __init__(
        self,
        store: FeatureStore,
        grid: tuple[int, int],
        seed: int,
        window: int = 1,
        references: int = 300,
        nearest: int = 24,
        on_images: Callable[[int], None] | None = None,
        variants: np.ndarray | None = None,
        looked: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        axes: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._grid, self._window, self._looked = grid, window, looked
        self._latest: tuple[bytes, tuple[torch.Tensor, torch.Tensor]] | None = None
        generator = torch.Generator().manual_seed(seed)
        count = len(store)
        chosen = torch.randperm(count, generator=generator)[:references].sort().values.numpy()
        if axes is None:
            sample = store.sample_patches(_SAMPLE, generator)
            axes = sample.mean(0), torch.linalg.eigh(torch.cov((sample - sample.mean(0)).T)).eigenvectors.flip(1)
        self.axes = axes[0], axes[1][:, :_DIMENSIONS].clone()
        memory = self._project(store.images(chosen))  # [P x M x D]
        variants = np.zeros(count, dtype=int) if variants is None else variants
        self.layouts = np.array([_layout(memory[:, variants[chosen] == v]) for v in range(variants.max() + 1)])
        norms = memory.square().sum(-1)
        patches, kept = len(memory), min(nearest, len(chosen))
        self._remembers_all = kept == len(chosen)
        compared = np.arange(count) if rows is None else rows
        self.distances = np.empty((len(compared), patches, kept), dtype=np.float16)
        self.images = np.empty((len(compared), patches, kept), dtype=np.int32)
        for start in range(0, len(compared), _CHUNK):
            part = slice(start, start + _CHUNK)
            squared = self._compare(self._project(store.images(compared[part])), memory, norms)
            own = torch.from_numpy(compared[part, None] == chosen[None])
            squared.masked_fill_(own.unsqueeze(0), float("inf"))
            values, columns = squared.topk(kept, dim=2, largest=False)
            # Infinity means that there is no such image, so no distance may become infinite by being rounded.
            values = torch.where(values.isinf(), values, values.sqrt().clamp_max(_FARTHEST))
            self.distances[part] = values.half().transpose(0, 1).numpy()
            self.images[part] = chosen[columns.transpose(0, 1).numpy()]
            if on_images:
                on_images(values.shape[1])

    def episodic(self, kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Distance of every patch to the nearest like it in a random half of the other images of a set.

        A support set takes each image with probability 1/2, so the nearest one is in it with probability 1/2, the
        second decides with 1/4, the third with 1/8: mean and standard deviation over *all* support sets in closed form.

        Args:
            kept (np.ndarray): Mask of the set, over the rows of the store.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Mean and standard deviation, ``[N x P]`` each; zero where there is no
                other image at all. Not to be written to: the next to ask about the set gets the same tensors.
        """
        # Structure and first round ask the same, and so do the last round and what follows it.
        asked = kept.tobytes()
        if self._latest is None or self._latest[0] != asked:
            results = [self._episodic(slice(i, i + _CHUNK), kept) for i in range(0, len(self.distances), _CHUNK)]
            mean, deviation = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*results, strict=True))
            self._latest = asked, (mean, deviation)
        return self._latest[1]

    def image_distances(self, kept: np.ndarray, tail: float) -> np.ndarray:
        """Mean distance of the most distant patches of each image, see `episodic`, ``[N]``.

        Args:
            kept (np.ndarray): ``[N]`` mask of the images that support sets are drawn from.
            tail (float): Share of the patches that count.
        """
        return image_score(self.episodic(kept)[0], tail).double().numpy()

    def _episodic(self, rows: slice, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances = self.distances[rows].astype(np.float32)
        exists = np.isfinite(distances)
        distances[~exists] = 0
        usable = exists & kept[self.images[rows]]
        weights = np.where(usable, 0.5 ** usable.cumsum(-1), 0.0).astype(np.float32)
        total = weights.sum(-1, keepdims=True)
        if self._remembers_all:  # an empty support set is none
            weights /= np.where(total > 0, total, 1)
            total = (total > 0).astype(np.float32)
        # What is left of the probability goes to the farthest one remembered: it stands for all beyond.
        farthest = np.maximum(exists.sum(-1) - 1, 0)[..., None]
        np.put_along_axis(weights, farthest, np.take_along_axis(weights, farthest, -1) + 1 - total, -1)
        mean = (weights * distances).sum(-1)
        variance = (weights * np.square(distances - mean[..., None])).sum(-1)
        return mean, np.sqrt(variance)

    def _project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Principal components, position first: ``[N x P x C]`` to ``[P x N x D]``."""
        centre, axes = self.axes
        return ((embeddings - centre) @ axes).transpose(0, 1).contiguous()

    def _compare(self, patches: torch.Tensor, memory: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Squared distance to the nearest patch of each reference within the window, ``[P x n x M]``."""
        rows, columns = self._grid
        places = torch.arange(rows * columns).view(rows, columns)
        looked = torch.ones(rows * columns, dtype=torch.bool) if self._looked is None else torch.tensor(self._looked)
        patch_at = looked.cumsum(0) - 1
        best = torch.full((len(patches), patches.shape[1], memory.shape[1]), float("inf"))
        farthest_down, farthest_right = min(self._window, rows - 1), min(self._window, columns - 1)
        for down in range(-farthest_down, farthest_down + 1):
            for right in range(-farthest_right, farthest_right + 1):
                here = places[max(0, -down) : rows - max(0, down), max(0, -right) : columns - max(0, right)].flatten()
                there = here + down * columns + right
                both = looked[here] & looked[there]
                here, there = patch_at[here[both]], patch_at[there[both]]
                inner = torch.baddbmm(norms[there].unsqueeze(1), patches[here], memory[there].mT, alpha=-2)
                best[here] = torch.minimum(best[here], inner)
        return (best + patches.square().sum(-1, keepdim=True)).clamp_min_(0)


def _layout(memory: torch.Tensor) -> float:
    """Share of the variance of patches ``[P x M x D]`` that their place explains."""
    if memory.shape[1] == 0:
        return float("nan")
    total = (memory - memory.mean((0, 1))).square().sum()
    own = (memory - memory.mean(1, keepdim=True)).square().sum()
    return float(1 - own / total) if total > 0 else 1.0
