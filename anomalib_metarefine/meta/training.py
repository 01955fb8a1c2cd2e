"""Meta-training: the outer loop over episodes of one or several categories.

References:
    Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv 1703.03400 (``maml``,
    ``fomaml``, its first-order approximation, and ``pretraining``, the baseline that it compares with).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anomalib_metarefine.meta.episodes import draw_episode
from anomalib_metarefine.meta.maml import as_leaves, get_learner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anomalib_metarefine.meta.episodes import Category
    from anomalib_metarefine.meta.maml import Loss, Parameters
    from anomalib_metarefine.settings import Settings

_MAX_NORM = 1.0  # of the outer gradient


def meta_train(
    categories: Sequence[Category],
    start: Parameters,
    loss: Loss,
    settings: Settings,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> Parameters:
    """Move an initialisation so that adapting it to a dirty support set does well on other images.

    Args:
        categories (Sequence[Category]): Each episode is drawn from one of them, in turn.
        start (Parameters): Left as it is.
        loss (Loss): Scalar loss of (parameters, batch), for support and query batches.
        settings (Settings): Steps, algorithm and backend. Pre-training has no inner loop: its support sets are
            empty.
        generator (torch.Generator): Source of randomness.
        on_step (Callable[[int, float], None]): Told number and mean query loss of every outer step.

    Returns:
        Parameters: Leaves that require gradients.
    """
    learner = get_learner(settings.meta_backend)
    inner_steps = 0 if settings.meta_algorithm == "pretraining" else settings.inner_steps
    parameters = as_leaves(start)
    optimizer = torch.optim.Adam(parameters.values(), lr=settings.meta_lr)
    for step in range(settings.meta_steps):
        numbers = range(step * settings.episodes, (step + 1) * settings.episodes)
        tasks = [
            draw_episode(
                categories[number % len(categories)],
                settings.support_images,
                inner_steps,
                settings.batch_patches,
                generator,
            )
            for number in numbers
        ]
        first_order = settings.meta_algorithm == "fomaml"
        gradient = learner.gradient(loss, parameters, tasks, settings.inner_lr, first_order)
        for name, value in parameters.items():
            value.grad = gradient.parameters[name]
        torch.nn.utils.clip_grad_norm_(parameters.values(), _MAX_NORM)
        optimizer.step()
        on_step(step, gradient.query_loss)
    return parameters
