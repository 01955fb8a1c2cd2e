"""Episodes from one dirty training set: adapt *from a dirty support set*, be right about normal patches.

A support set is drawn from the training images and dirtied on purpose at a random rate; the query set comes from
other images and is left as it is. The anomalies are made in feature space, which costs nothing: a patch that belongs
to another place of another image (cut-and-paste), or one pushed off the data along a random direction.

References:
    - Li et al., "CutPaste", arXiv 2104.04015 (the image-space form of the first kind).
    - Liu et al., "SimpleNet", arXiv 2303.15140 (Gaussian noise in feature space, the second kind).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_MAX_DIRTY = 0.4  # the highest contamination we expect on a line
_NOISE = 2.0  # standard deviations of the whitened embedding


class PatchBatch(NamedTuple):
    """Whitened patches and the code of their positions.

    Attributes:
        patches (torch.Tensor): ``[M x D]``.
        positions (torch.Tensor): ``[M x 16]``.
    """

    patches: torch.Tensor
    positions: torch.Tensor


class Episode(NamedTuple):
    """A task of meta-learning.

    Attributes:
        support (list[PatchBatch]): One dirtied batch for each inner step.
        query (PatchBatch): From images that are not in the support set.
    """

    support: list[PatchBatch]
    query: PatchBatch


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


def dirty(batch: PatchBatch, rate: float, generator: torch.Generator) -> PatchBatch:
    """Turn a share of the patches into synthetic anomalies, half of each kind; the others are left as they are."""
    count = int(rate * len(batch.patches))
    if count == 0:
        return batch
    victims = torch.randperm(len(batch.patches), generator=generator)[:count]
    donors = torch.randint(len(batch.patches), (count,), generator=generator)
    patches = batch.patches.clone()
    half = count // 2
    patches[victims[:half]] = batch.patches[donors[:half]]
    noise = torch.randn((count - half, patches.shape[1]), generator=generator)
    patches[victims[half:]] += _NOISE * noise
    return PatchBatch(patches, batch.positions)


def draw_episode(
    images: torch.Tensor,
    positions: torch.Tensor,
    support_images: int,
    steps: int,
    size: int,
    generator: torch.Generator,
) -> Episode:
    """One episode with disjoint support and query images (the same image twice where there is only one).

    Args:
        images (torch.Tensor): ``[N x P x D]``, whitened.
        positions (torch.Tensor): ``[P x 16]``.
        support_images (int): Size of the support set in images; at most half of the images are taken.
        steps (int): Inner steps, each with a batch of its own.
        size (int): Patches in a batch.
        generator (torch.Generator): Source of randomness.

    Returns:
        Episode: Support batches share one contamination rate, uniform between 0 and 40 %.
    """
    order = torch.randperm(len(images), generator=generator)
    split = min(support_images, max(len(order) // 2, 1))
    support, query = order[:split], order[split:]
    if len(query) == 0:
        query = support
    rate = _MAX_DIRTY * torch.rand((), generator=generator).item()
    batches = [dirty(draw_batch(images, positions, support, size, generator), rate, generator) for _ in range(steps)]
    return Episode(batches, draw_batch(images, positions, query, size, generator))
