"""The members of the MAML family, each as a few settings of one computation.

References:
    - Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv 1703.03400 (``maml``, and
      ``fomaml``, its first-order approximation; ``pretraining`` is the baseline it compares with).
    - Raghu et al., "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML",
      arXiv 1909.09157 (``anil``: almost no inner loop, only the last layers adapt).
    - Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", arXiv 1707.09835 (``metasgd``: a learned
      step size for every single weight).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from anomalib_metarefine.meta.maml import Initialisation, Parameters


@dataclass(frozen=True)
class Algorithm:
    """How an initialisation is learned.

    Attributes:
        first_order (bool): Take the inner gradients as constants.
        adapts (bool): Whether training has an inner loop; without one the support sets are empty.
        learned_step_sizes (bool): Learn a step size for every weight; otherwise all share a constant one.
        last_blocks (int | None): How many of the last blocks adapt; all of them if None.
    """

    first_order: bool = False
    adapts: bool = True
    learned_step_sizes: bool = False
    last_blocks: int | None = None


ALGORITHMS = {
    "maml": Algorithm(),
    "fomaml": Algorithm(first_order=True),
    "anil": Algorithm(last_blocks=1),
    "metasgd": Algorithm(learned_step_sizes=True),
    "pretraining": Algorithm(adapts=False),
}


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name.

    Args:
        name (str): A name of `ALGORITHMS`.

    Returns:
        Algorithm: Its settings.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in ALGORITHMS:
        msg = f"There is no meta-learning algorithm {name!r}. Choose one of {sorted(ALGORITHMS)}."
        raise ValueError(msg)
    return ALGORITHMS[name]


def initialise(
    parameters: Parameters, algorithm: Algorithm, inner_lr: float, adapted: Callable[[str], bool]
) -> Initialisation:
    """The starting point of meta-training.

    Args:
        parameters (Parameters): Leaf tensors that require gradients; taken as they are, not copied.
        algorithm (Algorithm): Says which step sizes there are.
        inner_lr (float): The step size, or its value before it is learned.
        adapted (Callable[[str], bool]): Whether the parameter of that name is in one of the last blocks; asked only
            where ``algorithm.last_blocks`` is set.

    Returns:
        Initialisation: A scalar step size for every parameter that adapts, or one of its shape that is learned.

    Example:
        >>> start = initialise({"w": torch.ones(2, requires_grad=True)}, get_algorithm("metasgd"), 0.5, lambda _: True)
        >>> start.step_sizes["w"]
        tensor([0.5000, 0.5000], requires_grad=True)
    """
    adapting = {name: value for name, value in parameters.items() if algorithm.last_blocks is None or adapted(name)}
    if algorithm.learned_step_sizes:
        step_sizes = {name: torch.full_like(value, inner_lr, requires_grad=True) for name, value in adapting.items()}
    else:
        step_sizes = {name: value.new_tensor(inner_lr) for name, value in adapting.items()}
    return Initialisation(parameters, step_sizes)
