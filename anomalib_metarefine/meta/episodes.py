"""Episodes from dirty training images: adapt *from a dirty support set*, be right about normal patches.

A support set is drawn from the training images and dirtied on purpose at a random rate; the query set comes from
other images and is left as it is. The anomalies are either patches of images that were spoilt before the backbone saw
them (`meta.synthetic`), or made in feature space, which costs nothing: a patch that belongs to another place of another
image (cut-and-paste), or one pushed off the data along a random direction.

References:
    - Li et al., "CutPaste", arXiv 2104.04015 (the image-space form of the first kind).
    - Liu et al., "SimpleNet", arXiv 2303.15140 (Gaussian noise in feature space, the second kind).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from anomalib_metarefine.meta.training import Category, MetaSettings

_MAX_DIRTY = 0.4  # the highest contamination we expect on a line
_NOISE = 2.0  # standard deviations of the whitened embedding


class PatchBatch(NamedTuple):
    """Whitened patches and the code of their positions.

    Attributes:
        patches (torch.Tensor): ``[M x D]``.
        positions (torch.Tensor): ``[M x 16]``.
        anomalous (torch.Tensor | None): ``[M]`` mask of the synthetic anomalies, where a loss is to rank them above the
            others; ``None`` where it must not know.
    """

    patches: torch.Tensor
    positions: torch.Tensor
    anomalous: torch.Tensor | None = None


class Episode(NamedTuple):
    """A task of meta-learning.

    Attributes:
        support (list[PatchBatch]): One dirtied batch for each inner step.
        query (PatchBatch): From images that are not in the support set.
    """

    support: list[PatchBatch]
    query: PatchBatch


def draw_patches(
    images: torch.Tensor, positions: torch.Tensor, usable: torch.Tensor, size: int, generator: torch.Generator
) -> PatchBatch:
    """Random patches out of those that may be learned from.

    Args:
        images (torch.Tensor): ``[N x P x D]``.
        positions (torch.Tensor): ``[P x 16]``.
        usable (torch.Tensor): ``[U x 2]`` numbers of image and place.
        size (int): Patches to draw, with replacement.
        generator (torch.Generator): Source of randomness.

    Returns:
        PatchBatch: ``size`` patches.
    """
    image, place = usable[torch.randint(len(usable), (size,), generator=generator)].T
    return PatchBatch(images[image, place], positions[place])


def draw_batch(
    images: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, size: int, generator: torch.Generator
) -> PatchBatch:
    """Random patches of some images.

    Args:
        images (torch.Tensor): ``[N x P x D]``.
        positions (torch.Tensor): ``[P x 16]``.
        rows (torch.Tensor): Indices of the images to draw from.
        size (int): Patches to draw, with replacement.
        generator (torch.Generator): Source of randomness.

    Returns:
        PatchBatch: ``size`` patches.
    """
    image = rows[torch.randint(len(rows), (size,), generator=generator)]
    place = torch.randint(len(positions), (size,), generator=generator)
    return PatchBatch(images[image, place], positions[place])


def dirty(
    batch: PatchBatch, rate: float, generator: torch.Generator, synthetic: PatchBatch | None = None
) -> PatchBatch:
    """Turn a share of the patches into synthetic anomalies; the others are left as they are.

    Args:
        batch (PatchBatch): ``M`` patches.
        rate (float): Share of them, in [0, 1].
        generator (torch.Generator): Source of randomness.
        synthetic (PatchBatch | None): Anomalous patches to draw from, with their positions; ``None`` makes half of them
            by cut-and-paste and half by noise.

    Returns:
        PatchBatch: ``M`` patches, with the mask of the anomalous ones.
    """
    count = int(rate * len(batch.patches))
    victims = torch.randperm(len(batch.patches), generator=generator)[:count]
    patches, positions = batch.patches.clone(), batch.positions.clone()
    if synthetic is not None:
        donors = torch.randint(len(synthetic.patches), (count,), generator=generator)
        patches[victims], positions[victims] = synthetic.patches[donors], synthetic.positions[donors]
    else:
        half = count // 2
        donors = torch.randint(len(patches), (half,), generator=generator)
        patches[victims[:half]] = batch.patches[donors]
        patches[victims[half:]] += _NOISE * torch.randn((count - half, patches.shape[1]), generator=generator)
    anomalous = torch.zeros(len(patches), dtype=torch.bool)
    anomalous[victims] = True
    return PatchBatch(patches, positions, anomalous)


def draw_episode(category: Category, inner_steps: int, settings: MetaSettings, generator: torch.Generator) -> Episode:
    """One episode with disjoint support and query images (the same image twice where there is only one).

    Args:
        category (Category): Where the images come from; at most half of them are support.
        inner_steps (int): Support batches, each of other patches.
        settings (MetaSettings): Sizes of support set and batches; whether the query has anomalies to be ranked.
        generator (torch.Generator): Source of randomness.

    Returns:
        Episode: Its batches share one contamination rate, uniform between 0 and 40 %.
    """
    images, positions, size = category.images, category.positions, settings.batch_patches
    order = torch.randperm(len(images), generator=generator)
    split = min(settings.support_images, max(len(order) // 2, 1))
    support, query = order[:split], order[split:]
    if len(query) == 0:
        query = support
    rate = _MAX_DIRTY * torch.rand((), generator=generator).item()

    def dirtied(rows: torch.Tensor) -> PatchBatch:
        return dirty(draw_batch(images, positions, rows, size, generator), rate, generator, category.synthetic)

    batches = [dirtied(support)._replace(anomalous=None) for _ in range(inner_steps)]
    return Episode(
        batches, dirtied(query) if settings.ranking > 0 else draw_batch(images, positions, query, size, generator)
    )
