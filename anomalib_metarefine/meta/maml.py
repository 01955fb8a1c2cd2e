"""Model-Agnostic Meta-Learning on plain dictionaries of parameters.

The inner loop adapts parameters to a support set by gradient descent; the outer loop moves the initialisation so that
the *adapted* parameters do well on a disjoint query set. A loss is any function of (parameters, batch), so nothing here
knows about flows.

References:
    Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv 1703.03400.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

Parameters = dict[str, torch.Tensor]
Loss = Callable[[Parameters, Any], torch.Tensor]


def adapt(
    loss: Loss, parameters: Parameters, batches: Iterable[Any], step_size: float, create_graph: bool = False
) -> Parameters:
    """Inner loop: one step of gradient descent per batch.

    Args:
        loss (Loss): Scalar loss of (parameters, batch).
        parameters (Parameters): Starting point; left as it is.
        batches (Iterable[Any]): One batch a step.
        step_size (float): The paper's alpha.
        create_graph (bool): Keep the graph through the steps, for a second-order outer gradient.

    Returns:
        Parameters: The adapted parameters; without ``create_graph`` they are leaves without history.

    Example:
        >>> square = lambda p, target: (p["w"] - target).square().sum()
        >>> adapt(square, {"w": torch.zeros(1, requires_grad=True)}, [1.0], step_size=0.25)["w"]
        tensor([0.5000], requires_grad=True)
    """
    for batch in batches:
        gradients = torch.autograd.grad(loss(parameters, batch), list(parameters.values()), create_graph=create_graph)
        parameters = {
            name: value - step_size * gradient
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
        if not create_graph:
            parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    return parameters


def meta_gradient(
    loss: Loss,
    parameters: Parameters,
    episodes: Sequence[tuple[Sequence[Any], Any]],
    step_size: float,
    first_order: bool = False,
) -> tuple[Parameters, float]:
    """Outer gradient: of the mean query loss after adaptation, with respect to the initialisation.

    Args:
        loss (Loss): Scalar loss of (parameters, batch).
        parameters (Parameters): The initialisation; its tensors require gradients.
        episodes (Sequence[tuple[Sequence[Any], Any]]): For each task its support batches (one inner step each) and its
            query batch.
        step_size (float): Inner step size.
        first_order (bool): Treat the adapted parameters as if they were the initialisation (FOMAML): no second
            derivatives, about half the time.

    Returns:
        tuple[Parameters, float]: Gradient by parameter name, and the mean query loss.
    """
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    query_loss = 0.0
    for support, query in episodes:
        adapted = adapt(loss, parameters, support, step_size, create_graph=not first_order)
        value = loss(adapted, query)
        source = adapted if first_order else parameters
        gradients = torch.autograd.grad(value, list(source.values()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient / len(episodes)
        query_loss += value.item() / len(episodes)
    return total, query_loss
