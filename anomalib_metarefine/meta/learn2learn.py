"""Meta-learning by learn2learn, behind the same interface as our own.

References:
    Arnold et al., "learn2learn: A Library for Meta-Learning Research", arXiv 2008.12284.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anomalib_metarefine.meta.maml import Initialisation, Loss, MetaGradient, Parameters, as_leaves, outer_gradient

if TYPE_CHECKING:
    from learn2learn.algorithms import MAML, MetaSGD


class Learn2LearnLearner:
    """`MetaLearner` by learn2learn's ``MAML``, or its ``MetaSGD`` where step sizes differ or are learned.

    Raises:
        ModuleNotFoundError: If learn2learn, or a package it imports, is not installed.
    """

    def __init__(self) -> None:
        try:
            import learn2learn
        except ModuleNotFoundError as error:
            msg = (
                f"The meta-learning backend 'learn2learn' was asked for, but {error.name} is not installed. pip can't "
                "install learn2learn next to anomalib: the C code of its release does not compile from Python 3.11 on, "
                "and a dependency pins numpy<2. Run `make learn2learn` in a clone of this project, which builds it "
                'from source, or set meta_backend="torch", which computes the same.'
            )
            raise ModuleNotFoundError(msg, name=error.name) from error
        self._algorithms = learn2learn.algorithms

    def adapt(self, loss: Loss, start: Initialisation, batches: Iterable[Any]) -> Parameters:
        """See `MetaLearner.adapt`."""
        return as_leaves(self._adapt(loss, self._learner(start), list(start.parameters), batches, first_order=True))

    def gradient(
        self, loss: Loss, start: Initialisation, episodes: Sequence[tuple[Sequence[Any], Any]], first_order: bool
    ) -> MetaGradient:
        """See `MetaLearner.gradient`."""
        # learn2learn adapts a module, and a module takes nothing but `nn.Parameter`.
        start = start._replace(parameters={name: nn.Parameter(value) for name, value in start.parameters.items()})
        learner = self._learner(start)

        def query_losses() -> Iterator[torch.Tensor]:
            for support, query in episodes:
                yield loss(self._adapt(loss, learner, list(start.parameters), support, first_order), query)

        return outer_gradient(start, query_losses(), len(episodes))

    def _learner(self, start: Initialisation) -> MAML | MetaSGD:
        # A list, because a module's own names must not have the dots that parameters of a nested module have.
        module = nn.ParameterList(start.parameters.values())
        sizes = list(start.step_sizes.values())
        if (
            start.step_sizes.keys() == start.parameters.keys()
            and not any(size.requires_grad or size.dim() for size in sizes)
            and len({size.item() for size in sizes}) == 1
        ):
            return self._algorithms.MAML(module, lr=sizes[0].item())
        zero = torch.zeros(())  # learn2learn steps on every parameter; those that do not adapt go nowhere
        return self._algorithms.MetaSGD(module, lrs=[start.step_sizes.get(name, zero) for name in start.parameters])

    @staticmethod
    def _adapt(
        loss: Loss, learner: MAML | MetaSGD, names: list[str], batches: Iterable[Any], first_order: bool
    ) -> Parameters:
        clone = learner.clone()
        parameters = dict(zip(names, clone.module.parameters(), strict=True))
        for batch in batches:
            with warnings.catch_warnings():
                # MetaSGD keeps gradients in `.grad` of tensors that are not leaves, on purpose.
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                clone.adapt(loss(parameters, batch), first_order=first_order)
            parameters = dict(zip(names, clone.module.parameters(), strict=True))
        return parameters
