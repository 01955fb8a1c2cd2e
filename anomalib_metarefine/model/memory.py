"""What a trained model remembers of its training images, so that it can be changed without them.

What a model has learned falls in two. Some of it is sums over images: count, mean and covariance of every place. The
rest is none: the whitening and the start of the flow, which were learned once on all images; ten steps of the flow on
drawn patches; the leave-one-out scores that thresholds come from; which patches lie in an unusual region. All of it
follows from the embeddings of the images, so they are what is remembered: ``N x P x C`` numbers in half precision,
23 MB for 300 images of 256 patches and 152 channels. Count, sum and outer product of every place are not stored beside
them: they follow from the embeddings in a quarter of a second, would take another 17 MB, and would drift.

An update is exact in this sense: it gives the model that a fit from scratch gives on the changed images with

- the same whitening and the same start of the flow, as if learned elsewhere (`init_from`);
- the same seed, so that references and patches are drawn alike from alike images;
- the same decisions: those about old images, and about their patches, stand; new images are judged by the standing
  model. With ``reconsider`` all images are judged anew, in rounds from the start, and this restriction falls.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anomalib_metarefine.features.embedding import Whitening
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.refinement.fitting import Images
from anomalib_metarefine.refinement.structure import Structure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anomalib_metarefine.density.patch_density import Parameters
    from anomalib_metarefine.refinement.engine import Result
    from anomalib_metarefine.refinement.structure import Kind

_MOMENTS = 131_072  # patches that mean and covariance are computed from
_WHITENED_MB = 256  # of embeddings; of more, the whitened ones would take too much memory


@dataclass(frozen=True)
class Memory:
    """Of ``N`` training images with ``P`` patches of ``C`` channels, in the order of `Refinement.paths`.

    Attributes:
        embeddings (torch.Tensor): ``[N x P x C]``, half precision.
        grid (tuple[int, int]): Rows and columns of patches.
        mean (torch.Tensor): Of the whitening, ``[C]``.
        projection (torch.Tensor): Of the whitening, ``[C x D]``.
        initial (Parameters): Where the flow begins.
        learned (torch.Tensor): ``[N x P]`` mask of the patches to learn from, were the image kept.
        distances (torch.Tensor | None): ``[N x P]``, half precision, to the nearest other images when the image was
            judged; ``None`` if images are not compared.
        regions (bool): Whether unusual regions are left out.
        kind (Kind): See `Structure`.
        kinds (tuple[Kind, ...]): See `Structure`.
        names (tuple[str, ...]): See `Structure`.
        variants (torch.Tensor): ``[N]`` number of each image's variant.
        moments (tuple[torch.Tensor, torch.Tensor]): Mean ``[D]`` and covariance ``[D x D]`` of the whitened patches of
            the kept images when all was learned.
        trained (int): Images then.
        looked (torch.Tensor | None): See `Images`.
        axes (tuple[torch.Tensor, torch.Tensor] | None): That images were compared along, see `NearestImages`.
    """

    embeddings: torch.Tensor
    grid: tuple[int, int]
    mean: torch.Tensor
    projection: torch.Tensor
    initial: Parameters
    learned: torch.Tensor
    distances: torch.Tensor | None
    regions: bool
    kind: Kind
    kinds: tuple[Kind, ...]
    names: tuple[str, ...]
    variants: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor]
    trained: int
    looked: torch.Tensor | None = None
    axes: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, result: Result) -> Memory:
        """What is to be remembered of a run of the engine."""
        store, whitening = result.images.store, result.density.whitening
        embeddings = store.images().half()
        learned = torch.from_numpy(store.read("learned"))
        kept = torch.from_numpy(result.kept)
        return cls(
            embeddings, result.images.grid, whitening.mean, whitening.projection,
            {name: value.detach() for name, value in result.initial.items()}, learned,
            torch.from_numpy(store.read("distances")).half() if result.axes else None,
            not store.read("usual").all(), result.structure.kind, result.structure.kinds, result.structure.names,
            torch.from_numpy(result.structure.variants.copy()),
            _moments(whitening, embeddings[kept]), len(store),
            None if result.images.looked is None else torch.from_numpy(result.images.looked), result.axes,
        )  # fmt: skip

    @property
    def structure(self) -> Structure:
        """What kind of folder it is, without the evidence."""
        missing = float("nan")
        return Structure(self.kind, missing, missing, self.variants.numpy(), self.names, self.kinds)

    @property
    def whitening(self) -> Whitening:
        """Global whitening, as it was learned."""
        return Whitening(self.mean, self.projection)

    @property
    def megabytes(self) -> float:
        """Of the embeddings."""
        return self.embeddings.nbytes / 2**20

    def images(self, paths: Sequence[str]) -> Images:
        """The images as the engine sees them, by their paths."""
        store, variants = FeatureStore(), self.variants.numpy()
        looked = None if self.looked is None else self.looked.numpy()
        store.add(paths, self.embeddings)
        if self.embeddings.nbytes <= _WHITENED_MB * 2**20:  # an update goes through them four times
            store.keep(whitened=self.whitening(store.images()).numpy())
        return Images(store, self.whitening, self.grid, variants, looked, self.structure.comparable)

    def take(self, rows: np.ndarray) -> Memory:
        """Of some of the images only, in this order."""
        names = ("embeddings", "learned", "variants", *(["distances"] if self.distances is not None else []))
        return replace(self, **{name: getattr(self, name)[torch.from_numpy(rows)] for name in names})

    def with_images(self, embeddings: torch.Tensor) -> Memory:
        """With further images at the end, ``[n x P x C]``, that nothing is known about yet."""
        count, patches = embeddings.shape[:2]
        distances = self.distances
        if distances is not None:
            distances = torch.cat([distances, distances.new_zeros(count, patches)])
        return replace(
            self,
            embeddings=torch.cat([self.embeddings, embeddings.half()]),
            learned=torch.cat([self.learned, self.learned.new_ones(count, patches)]),
            variants=torch.cat([self.variants, self.variants.new_zeros(count)]),
            distances=distances,
        )

    def with_names(self, named: Mapping[int, str]) -> Memory:
        """With images of some rows in the variants that the user names; a new name is a new variant."""
        names = (*self.names, *dict.fromkeys(name for name in named.values() if name not in self.names))
        kinds = self.kinds + ("aligned",) * (len(names) - len(self.names)) if self.kinds else ()
        variants = self.variants.clone()
        for row, name in named.items():
            variants[row] = names.index(name)
        return replace(self, variants=variants, names=names, kinds=kinds)

    def drift(self, kept: np.ndarray) -> float:
        """What whitening by old statistics costs: divergence of the kept images' patches from those of the training.

        Args:
            kept (np.ndarray): ``[N]`` mask.

        Returns:
            float: Kullback-Leibler divergence of two normal distributions, in bits per dimension as scores are.
        """
        mean, covariance = _moments(self.whitening, self.embeddings[torch.from_numpy(kept)])
        before, spread = self.moments
        root = torch.linalg.cholesky(spread)
        ratio = torch.cholesky_solve(covariance, root)
        shift = torch.linalg.solve_triangular(root, (mean - before).unsqueeze(1), upper=False).square().sum()
        nats = 0.5 * (ratio.trace() + shift - len(mean) - torch.linalg.slogdet(ratio).logabsdet)
        return max(float(nats / (len(mean) * np.log(2))), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names, for a checkpoint that loads with ``weights_only=True``."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Memory:
        """The inverse of `to_dict`."""
        return cls(**data)


def _moments(whitening: Whitening, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance, in double precision, of the whitened patches of images ``[N x P x C]``."""
    patches = embeddings.flatten(0, 1)
    if len(patches) > _MOMENTS:
        patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:_MOMENTS]]
    patches = whitening(patches.float())
    ridge = 1e-3 * torch.eye(patches.shape[1], dtype=torch.double)  # flat images have no covariance
    return patches.mean(0).double(), torch.cov(patches.T).double() + ridge
