"""Our meta-learning against that of learn2learn, the reference implementation, on the flow and its loss."""

import importlib
import os
import sys

import pytest
import torch
from torch.func import functional_call

from anomalib_metarefine.density.flow import PatchFlow, bits_per_dimension
from anomalib_metarefine.meta.maml import TorchLearner, get_learner

STEP = 0.1


@pytest.fixture
def reference():
    if os.environ.get("METAREFINE_REQUIRE_LEARN2LEARN"):  # where it must be there, its absence is an error
        importlib.import_module("learn2learn")
    pytest.importorskip("learn2learn")
    return get_learner("learn2learn")


def task(dtype, steps):
    """Loss, initialisation and two episodes; a random flow, because the untrained one is the identity."""
    generator = torch.Generator().manual_seed(steps)
    flow = PatchFlow(8, blocks=3, hidden=16).to(dtype)
    parameters = {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).to(dtype).detach().requires_grad_()
        for name, value in flow.named_parameters()
        if value.requires_grad
    }

    def trimmed_likelihood(parameters, batch):
        bits = bits_per_dimension(*functional_call(flow, parameters, batch))
        return bits.topk(round(0.9 * len(bits)), largest=False).values.mean()

    def batch():
        return tuple(torch.randn((64, channels), generator=generator, dtype=dtype) for channels in (8, 16))

    return trimmed_likelihood, parameters, [([batch() for _ in range(steps)], batch()) for _ in range(2)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_adapted_parameters_are_those_of_learn2learn(reference, steps, dtype):
    loss, start, ((support, _), *_) = task(dtype, steps)
    expected = reference.adapt(loss, start, support, STEP)
    assert_same(TorchLearner().adapt(loss, start, support, STEP), expected)
    assert all(value.is_leaf and value.requires_grad for value in expected.values())
    assert all(not torch.equal(value, start[key]) for key, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_meta_gradient_is_that_of_learn2learn(reference, steps, first_order, dtype):
    loss, start, episodes = task(dtype, steps)
    expected = reference.gradient(loss, start, episodes, STEP, first_order)
    found = TorchLearner().gradient(loss, start, episodes, STEP, first_order)
    assert_same(found.parameters, expected.parameters)
    assert found.query_loss == pytest.approx(expected.query_loss, abs=1e-5)


def test_the_steps_are_learn2learns_own(reference, monkeypatch):
    import learn2learn

    class Reached(Exception):  # noqa: N818
        """The method of learn2learn was called."""

    def adapt(*_, **__):
        raise Reached

    monkeypatch.setattr(learn2learn.algorithms.MAML, "adapt", adapt)
    loss, start, ((support, _), *_) = task(torch.float32, 1)
    with pytest.raises(Reached):
        reference.adapt(loss, start, support, STEP)


def test_a_missing_learn2learn_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"'learn2learn' was asked for.*make learn2learn.*meta_backend"
    ) as info:
        get_learner("learn2learn")
    assert info.value.name == "learn2learn"
