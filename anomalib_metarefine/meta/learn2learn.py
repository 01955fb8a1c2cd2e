"""Meta-learning by learn2learn, behind the same interface as our own.

References:
    Arnold et al., "learn2learn: A Library for Meta-Learning Research", arXiv 2008.12284.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from anomalib_metarefine.meta.maml import Loss, MetaGradient, Parameters, Task, as_leaves, outer_gradient

if TYPE_CHECKING:
    import torch
    from learn2learn.algorithms import MAML


class Learn2LearnLearner:
    """`MetaLearner` by learn2learn's ``MAML``.

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
        self._maml = learn2learn.algorithms.MAML

    def adapt(self, loss: Loss, start: Parameters, batches: Iterable[Any], step_size: float) -> Parameters:
        """See `MetaLearner.adapt`."""
        learner = self._maml(_module(start), lr=step_size)
        return as_leaves(_adapted(loss, learner, list(start), batches, first_order=True))

    def gradient(
        self, loss: Loss, start: Parameters, tasks: Sequence[Task], step_size: float, first_order: bool
    ) -> MetaGradient:
        """See `MetaLearner.gradient`."""
        module = _module(start)
        learner = self._maml(module, lr=step_size)

        def query_losses() -> Iterator[torch.Tensor]:
            for support, query in tasks:
                yield loss(_adapted(loss, learner, list(start), support, first_order), query)

        return outer_gradient(dict(zip(start, module, strict=True)), query_losses(), len(tasks))


def _module(parameters: Parameters) -> nn.ParameterList:
    """A list, because a module's own names must not have the dots that parameters of a nested module have."""
    return nn.ParameterList([nn.Parameter(value) for value in parameters.values()])


def _adapted(loss: Loss, learner: MAML, names: list[str], batches: Iterable[Any], first_order: bool) -> Parameters:
    clone = learner.clone()
    parameters = dict(zip(names, clone.module.parameters(), strict=True))
    for batch in batches:
        clone.adapt(loss(parameters, batch), first_order=first_order)
        parameters = dict(zip(names, clone.module.parameters(), strict=True))
    return parameters
