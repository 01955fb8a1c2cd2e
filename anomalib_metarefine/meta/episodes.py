"""Episodes from dirty training images: adapt *from a dirty support set*, be right about normal patches.

A support set is drawn from the training images and dirtied on purpose at a random rate; the query set comes from
other images and is left as it is. The anomalies are made in feature space: a patch that belongs to another place of
another image (cut-and-paste), or one pushed off the data along a random direction. Anomalies made of images, before the
backbone, found no more (`studies/meta.md`).

References:
    - Li et al., "CutPaste", arXiv 2104.04015 (the image-space form of the first kind).
    - Liu et al., "SimpleNet", arXiv 2303.15140 (Gaussian noise in feature space, the second kind).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_MAX_DIRTY = 0.4  # the highest contamination we expect on a line
_NOISE = 2.0  # standard deviations of the whitened embedding


class Category(NamedTuple):
    """Images that episodes are drawn from."""

    images: torch.Tensor  # whitened patches [N x P x D]
    positions: torch.Tensor  # their position codes [P x 16]


class PatchBatch(NamedTuple):
    """Whitened patches and the code of their positions."""

    patches: torch.Tensor  # [M x D]
    positions: torch.Tensor  # [M x 16]


class Episode(NamedTuple):
    """A task of meta-learning."""

    support: list[PatchBatch]  # one dirtied batch for each inner step
    query: PatchBatch  # from images that are not in the support set


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
    """The same out of all patches of some images, whose indices are ``rows``."""
    image = rows[torch.randint(len(rows), (size,), generator=generator)]
    place = torch.randint(len(positions), (size,), generator=generator)
    return PatchBatch(images[image, place], positions[place])


def dirty(batch: PatchBatch, rate: float, generator: torch.Generator) -> PatchBatch:
    """Turn a share of the patches into synthetic anomalies, half by cut-and-paste and half by noise.

    Args:
        batch (PatchBatch): ``M`` patches; left as they are.
        rate (float): Share of them, in [0, 1].
        generator (torch.Generator): Source of randomness.

    Returns:
        PatchBatch: ``M`` patches at the same positions.
    """
    count = int(rate * len(batch.patches))
    half = count // 2
    victims = torch.randperm(len(batch.patches), generator=generator)[:count]
    patches = batch.patches.clone()
    donors = torch.randint(len(patches), (half,), generator=generator)
    patches[victims[:half]] = batch.patches[donors]
    patches[victims[half:]] += _NOISE * torch.randn((count - half, patches.shape[1]), generator=generator)
    return PatchBatch(patches, batch.positions)


def draw_episode(
    category: Category, support_images: int, inner_steps: int, batch_patches: int, generator: torch.Generator
) -> Episode:
    """One episode with disjoint support and query images (the same image twice where there is only one).

    Args:
        category (Category): Where the images come from.
        support_images (int): Images of the support set; at most half of all.
        inner_steps (int): Support batches, each of other patches.
        batch_patches (int): Patches of every batch.
        generator (torch.Generator): Source of randomness.

    Returns:
        Episode: Its support batches share one contamination rate, uniform between 0 and 40 %.
    """
    order = torch.randperm(len(category.images), generator=generator)
    split = min(support_images, max(len(order) // 2, 1))
    support, query = order[:split], order[split:]
    if len(query) == 0:
        query = support
    rate = _MAX_DIRTY * torch.rand((), generator=generator).item()

    def drawn(images: torch.Tensor) -> PatchBatch:
        return draw_batch(*category, images, batch_patches, generator)

    return Episode([dirty(drawn(support), rate, generator) for _ in range(inner_steps)], drawn(query))
