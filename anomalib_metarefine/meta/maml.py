"""Model-Agnostic Meta-Learning on plain dictionaries of parameters.

The inner loop adapts parameters to a support set by gradient descent. The outer loop moves the initialisation so that
the *adapted* parameters do well on a disjoint query set. A loss is any function of (parameters, batch), so nothing here
knows about flows.

References:
    Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv 1703.03400.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Parameters = dict[str, torch.Tensor]
Loss = Callable[[Parameters, Any], torch.Tensor]
Task = tuple[Sequence[Any], Any]
BACKENDS = ("torch", "learn2learn")


class MetaGradient(NamedTuple):
    """Gradient of the mean query loss after adaptation, with respect to the initialisation."""

    parameters: Parameters  # gradient of every parameter
    query_loss: float  # the mean query loss


class MetaLearner(Protocol):
    """The two loops of MAML."""

    def adapt(self, loss: Loss, start: Parameters, batches: Iterable[Any], step_size: float) -> Parameters:
        """Inner loop: one step of gradient descent per batch.

        Args:
            loss (Loss): Scalar loss of (parameters, batch).
            start (Parameters): The initialisation; left as it is.
            batches (Iterable[Any]): One batch a step.
            step_size (float): Of every step and parameter.

        Returns:
            Parameters: The adapted parameters: leaves without history that require gradients.
        """

    def gradient(
        self, loss: Loss, start: Parameters, tasks: Sequence[Task], step_size: float, first_order: bool
    ) -> MetaGradient:
        """Outer loop: the gradient that moves the initialisation.

        Args:
            loss (Loss): Scalar loss of (parameters, batch).
            start (Parameters): The initialisation: leaves that require gradients. Left as it is.
            tasks (Sequence[Task]): At least one, each with its support batches (an inner step each) and its query
                batch. Without support batches this is plain training on the query batch.
            step_size (float): Of the inner steps.
            first_order (bool): Take the inner gradients as constants (FOMAML): no second derivatives, about half the
                time.

        Returns:
            MetaGradient: Of the mean query loss.
        """


class TorchLearner:
    """`MetaLearner` by ``torch.autograd``.

    Example:
        >>> square = lambda p, target: (p["w"] - target).square().sum()
        >>> TorchLearner().adapt(square, {"w": torch.zeros(1, requires_grad=True)}, [1.0], step_size=0.25)["w"]
        tensor([0.5000], requires_grad=True)
    """

    def adapt(self, loss: Loss, start: Parameters, batches: Iterable[Any], step_size: float) -> Parameters:
        """See `MetaLearner.adapt`."""
        parameters = as_leaves(start)
        for batch in batches:
            parameters = as_leaves(_step(loss, parameters, batch, step_size, create_graph=False))
        return parameters

    def gradient(
        self, loss: Loss, start: Parameters, tasks: Sequence[Task], step_size: float, first_order: bool
    ) -> MetaGradient:
        """See `MetaLearner.gradient`."""

        def query_losses() -> Iterator[torch.Tensor]:
            for support, query in tasks:
                parameters = start
                for batch in support:
                    parameters = _step(loss, parameters, batch, step_size, create_graph=not first_order)
                yield loss(parameters, query)

        return outer_gradient(start, query_losses(), len(tasks))


def get_learner(backend: str) -> MetaLearner:
    """The implementation of meta-learning of that name.

    Args:
        backend (str): ``"torch"`` or ``"learn2learn"``; both compute the same.

    Returns:
        MetaLearner: The implementation.

    Raises:
        ValueError: If there is none of that name.
        ModuleNotFoundError: If learn2learn is asked for and is not installed.
    """
    if backend == "torch":
        return TorchLearner()
    if backend == "learn2learn":
        from anomalib_metarefine.meta.learn2learn import Learn2LearnLearner

        return Learn2LearnLearner()
    msg = f"There is no meta-learning backend {backend!r}. Choose one of {list(BACKENDS)}."
    raise ValueError(msg)


def outer_gradient(start: Parameters, query_losses: Iterable[torch.Tensor], count: int) -> MetaGradient:
    """Gradient of the mean of ``count`` query losses whose graphs lead back to ``start``.

    The losses come one by one, so that only one task's graph is in memory at a time.
    """
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    mean = 0.0
    for value in query_losses:
        gradients = torch.autograd.grad(value, list(start.values()))
        for name, gradient in zip(start, gradients, strict=True):
            total[name] = total[name] + gradient / count
        mean += value.item() / count
    return MetaGradient(total, mean)


def as_leaves(parameters: Parameters) -> Parameters:
    """Copies without history that require gradients."""
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def _step(
    loss: Loss,
    parameters: Parameters,
    batch: Any,  # noqa: ANN401
    step_size: float,
    create_graph: bool,
) -> Parameters:
    gradients = torch.autograd.grad(loss(parameters, batch), list(parameters.values()), create_graph=create_graph)
    return {
        name: value - step_size * gradient
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
    }
