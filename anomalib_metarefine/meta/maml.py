"""Model-Agnostic Meta-Learning on plain dictionaries of parameters.

The inner loop adapts parameters to a support set by gradient descent; the outer loop moves the initialisation so that
the *adapted* parameters do well on a disjoint query set. A loss is any function of (parameters, batch), so nothing here
knows about flows.

References:
    - Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv 1703.03400.
    - Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", arXiv 1707.09835 (learned step sizes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Parameters = dict[str, torch.Tensor]
Loss = Callable[[Parameters, Any], torch.Tensor]
BACKENDS = ("torch", "learn2learn")


class Initialisation(NamedTuple):
    """What meta-learning learns: where adaptation starts, and how large its steps are.

    Attributes:
        parameters (Parameters): Leaf tensors that require gradients.
        step_sizes (Parameters): By names of ``parameters``: a scalar, or a tensor of the parameter's shape (Meta-SGD).
            A parameter without one does not adapt (ANIL). Those that require gradients are learned.
    """

    parameters: Parameters
    step_sizes: Parameters


class MetaGradient(NamedTuple):
    """Gradient of the mean query loss after adaptation, with respect to the initialisation.

    Attributes:
        parameters (Parameters): Gradient of every parameter.
        step_sizes (Parameters): Gradient of every step size that is learned.
        query_loss (float): The mean query loss.
    """

    parameters: Parameters
    step_sizes: Parameters
    query_loss: float


class MetaLearner(Protocol):
    """The two loops of MAML."""

    def adapt(self, loss: Loss, start: Initialisation, batches: Iterable[Any]) -> Parameters:
        """Inner loop: one step of gradient descent per batch.

        Args:
            loss (Loss): Scalar loss of (parameters, batch).
            start (Initialisation): Starting point; left as it is.
            batches (Iterable[Any]): One batch a step.

        Returns:
            Parameters: The adapted parameters: leaves without history that require gradients.
        """

    def gradient(
        self, loss: Loss, start: Initialisation, episodes: Sequence[tuple[Sequence[Any], Any]], first_order: bool
    ) -> MetaGradient:
        """Outer loop: the gradient that moves the initialisation.

        Args:
            loss (Loss): Scalar loss of (parameters, batch).
            start (Initialisation): The initialisation; left as it is.
            episodes (Sequence[tuple[Sequence[Any], Any]]): For each task, at least one, its support batches (an inner
                step each) and its query batch. Without support batches this is plain training on the query batch.
            first_order (bool): Take the inner gradients as constants (FOMAML): no second derivatives, about half the
                time.

        Returns:
            MetaGradient: Of the mean query loss.
        """


class TorchLearner:
    """`MetaLearner` by ``torch.autograd``.

    Example:
        >>> square = lambda p, target: (p["w"] - target).square().sum()
        >>> start = Initialisation({"w": torch.zeros(1, requires_grad=True)}, {"w": torch.tensor(0.25)})
        >>> TorchLearner().adapt(square, start, [1.0])["w"]
        tensor([0.5000], requires_grad=True)
    """

    def adapt(self, loss: Loss, start: Initialisation, batches: Iterable[Any]) -> Parameters:
        """See `MetaLearner.adapt`."""
        parameters = as_leaves(start.parameters)
        for batch in batches:
            parameters = as_leaves(_step(loss, parameters, start.step_sizes, batch, create_graph=False))
        return parameters

    def gradient(
        self, loss: Loss, start: Initialisation, episodes: Sequence[tuple[Sequence[Any], Any]], first_order: bool
    ) -> MetaGradient:
        """See `MetaLearner.gradient`."""

        def query_losses() -> Iterator[torch.Tensor]:
            for support, query in episodes:
                parameters = start.parameters
                for batch in support:
                    parameters = _step(loss, parameters, start.step_sizes, batch, create_graph=not first_order)
                yield loss(parameters, query)

        return outer_gradient(start, query_losses(), len(episodes))


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


def outer_gradient(start: Initialisation, query_losses: Iterable[torch.Tensor], count: int) -> MetaGradient:
    """Gradient of the mean of ``count`` query losses whose graphs lead back to ``start``.

    The losses come one by one, so that only one task's graph is in memory at a time.
    """
    learned = {name: size for name, size in start.step_sizes.items() if size.requires_grad}
    sources = [*start.parameters.values(), *learned.values()]
    total = [torch.zeros_like(source) for source in sources]
    mean = 0.0
    for value in query_losses:
        # Zeros for what the loss does not depend on: step sizes, when there is no support set.
        gradients = torch.autograd.grad(value, sources, materialize_grads=True)
        total = [so_far + gradient / count for so_far, gradient in zip(total, gradients, strict=True)]
        mean += value.item() / count
    split = len(start.parameters)
    return MetaGradient(
        dict(zip(start.parameters, total[:split], strict=True)), dict(zip(learned, total[split:], strict=True)), mean
    )


def as_leaves(parameters: Parameters) -> Parameters:
    """Copies without history that require gradients."""
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def _step(
    loss: Loss,
    parameters: Parameters,
    step_sizes: Parameters,
    batch: Any,  # noqa: ANN401
    create_graph: bool,
) -> Parameters:
    adapting = [parameters[name] for name in step_sizes]
    gradients = torch.autograd.grad(loss(parameters, batch), adapting, create_graph=create_graph)
    return parameters | {
        name: value - step_sizes[name] * gradient
        for name, value, gradient in zip(step_sizes, adapting, gradients, strict=True)
    }
