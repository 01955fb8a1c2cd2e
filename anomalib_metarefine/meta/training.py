"""Meta-training: the outer loop over episodes of one or several categories.

References:
    Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv 1703.03400.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from anomalib_metarefine.meta.algorithms import get_algorithm
from anomalib_metarefine.meta.episodes import draw_episode
from anomalib_metarefine.meta.maml import Initialisation, as_leaves, get_learner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anomalib_metarefine.meta.episodes import PatchBatch
    from anomalib_metarefine.meta.maml import Loss

_MAX_NORM = 1.0  # of the outer gradient


@dataclass(frozen=True)
class MetaSettings:
    """Settings of meta-training; `MetaRefine` documents each, and has the same defaults."""

    meta_algorithm: str = "maml"
    meta_backend: str = "torch"
    meta_steps: int = 10
    episodes: int = 2
    support_images: int = 16
    inner_steps: int = 2
    inner_lr: float = 0.1
    meta_lr: float = 5e-4
    batch_patches: int = 1024
    ranking: float = 0.0


class Category(NamedTuple):
    """Images that episodes are drawn from.

    Attributes:
        images (torch.Tensor): Whitened patches ``[N x P x D]``.
        positions (torch.Tensor): Their position codes ``[P x 16]``.
        synthetic (PatchBatch | None): Patches of synthetic anomalies that support sets are dirtied with; ``None`` makes
            them of the patches at hand.
    """

    images: torch.Tensor
    positions: torch.Tensor
    synthetic: PatchBatch | None = None


def meta_train(
    categories: Sequence[Category],
    start: Initialisation,
    loss: Loss,
    settings: MetaSettings,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> Initialisation:
    """Move an initialisation so that adapting it to a dirty support set does well on other images.

    Args:
        categories (Sequence[Category]): Each episode is drawn from one of them, in turn.
        start (Initialisation): Left as it is.
        loss (Loss): Scalar loss of (parameters, batch), for support and query batches.
        settings (MetaSettings): Steps, algorithm and backend.
        generator (torch.Generator): Source of randomness.
        on_step (Callable[[int, float], None]): Told number and mean query loss of every outer step.

    Returns:
        Initialisation: Leaves that require gradients, as far as they learn.
    """
    algorithm, learner = get_algorithm(settings.meta_algorithm), get_learner(settings.meta_backend)
    inner_steps = settings.inner_steps if algorithm.adapts else 0
    learned = {name: size for name, size in start.step_sizes.items() if size.requires_grad}
    start = Initialisation(as_leaves(start.parameters), start.step_sizes | as_leaves(learned))
    optimizer = torch.optim.Adam(
        [*start.parameters.values(), *(start.step_sizes[name] for name in learned)], lr=settings.meta_lr
    )
    drawn = 0
    for step in range(settings.meta_steps):
        batch = []
        for _ in range(settings.episodes):
            category = categories[drawn % len(categories)]
            batch.append(draw_episode(category, inner_steps, settings, generator))
            drawn += 1
        gradient = learner.gradient(loss, start, batch, algorithm.first_order)
        for values, gradients in ((start.parameters, gradient.parameters), (start.step_sizes, gradient.step_sizes)):
            for name, value in gradients.items():
                values[name].grad = value
        torch.nn.utils.clip_grad_norm_(start.parameters.values(), _MAX_NORM)
        optimizer.step()
        on_step(step, gradient.query_loss)
    return start
