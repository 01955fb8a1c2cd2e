import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.meta.maml import TorchLearner, get_learner

EPISODES = [([torch.tensor([1.0, 2.0])] * 2, torch.tensor([0.5, 1.0])), ([torch.tensor([-1.0, 0.0])], torch.zeros(2))]
LEARNER = TorchLearner()
STEP = 0.1


def quartic(parameters, target):
    """Not quadratic, so that second derivatives differ along the way; `b` is coupled with `w`."""
    w, b = parameters["w"], parameters["b"]
    return 0.5 * (w - target).square().sum() + w.pow(4).sum() / 4 + (b * w[0]).sin() + 0.5 * b.square()


def tensor(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def start():
    return {"w": tensor([0.3, -0.7], grad=True), "b": tensor(0.4, grad=True)}


def mean_query_loss(initial):
    adapted = [(LEARNER.adapt(quartic, initial, support, STEP), query) for support, query in EPISODES]
    return sum(quartic(parameters, query).item() for parameters, query in adapted) / len(EPISODES)


def numeric_gradient(initial, value, eps=1e-6):
    """Central differences of the mean query loss with respect to one tensor of the initialisation."""
    result = torch.zeros_like(value)
    for i in range(value.numel()):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                value.view(-1)[i] += sign * eps
            losses.append(mean_query_loss(initial))
            with torch.no_grad():
                value.view(-1)[i] -= sign * eps
        result.view(-1)[i] = (losses[0] - losses[1]) / (2 * eps)
    return result


def test_second_order_gradient_is_that_of_the_whole_computation():
    initial = start()
    gradient = LEARNER.gradient(quartic, initial, EPISODES, STEP, first_order=False)
    assert gradient.query_loss == pytest.approx(mean_query_loss(initial))
    assert gradient.parameters.keys() == initial.keys()
    for name, value in initial.items():
        expected = numeric_gradient(initial, value)
        torch.testing.assert_close(gradient.parameters[name], expected, atol=1e-7, rtol=1e-6)


def test_first_order_gradient_is_taken_at_the_adapted_parameters():
    initial = start()
    (support, query), *_ = EPISODES
    first = LEARNER.gradient(quartic, initial, [(support, query)], STEP, first_order=True).parameters
    adapted = LEARNER.adapt(quartic, initial, support, STEP)
    expected = torch.autograd.grad(quartic(adapted, query), list(adapted.values()))
    torch.testing.assert_close(list(first.values()), list(expected))
    second = LEARNER.gradient(quartic, initial, [(support, query)], STEP, first_order=False).parameters
    assert not torch.allclose(first["w"], second["w"])


@given(
    w=st.lists(st.floats(-2, 2), min_size=2, max_size=2),
    targets=st.lists(st.floats(-2, 2), min_size=1, max_size=4),
    first_order=st.booleans(),
)
@settings(deadline=None)
def test_without_support_it_is_the_plain_gradient(w, targets, first_order):
    parameters = {"w": tensor(w, grad=True), "b": tensor(0.4, grad=True)}
    found = LEARNER.gradient(quartic, parameters, [((), tensor(t)) for t in targets], STEP, first_order)
    mean = sum(quartic(parameters, tensor(t)) for t in targets) / len(targets)
    torch.testing.assert_close(list(found.parameters.values()), list(torch.autograd.grad(mean, parameters.values())))
    assert found.query_loss == pytest.approx(mean.item())


@given(
    curvature=st.lists(st.floats(0.1, 3), min_size=3, max_size=3),
    distance=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    step_size=st.floats(0, 0.5),
    steps=st.integers(0, 5),
)
@settings(deadline=None)
def test_steps_on_a_parabola_have_a_closed_form(curvature, distance, step_size, steps):
    # On 0.5 a w^2 a step shrinks w by 1 - s a; after k steps of it the query loss 0.5 a w^2 has the gradient
    # a (1 - s a)^2k w, and in first order a (1 - s a)^k w.
    a, w = tensor(curvature), tensor(distance, grad=True)

    def parabola(parameters, _):
        return 0.5 * (a * parameters["w"].square()).sum()

    shrinkage = (1 - step_size * a) ** steps
    adapted = LEARNER.adapt(parabola, {"w": w}, [None] * steps, step_size)
    torch.testing.assert_close(adapted["w"], shrinkage * w)
    for first_order, power in [(True, 1), (False, 2)]:
        found = LEARNER.gradient(parabola, {"w": w}, [([None] * steps, None)], step_size, first_order)
        torch.testing.assert_close(found.parameters["w"], (a * shrinkage**power * w).detach())


@pytest.mark.parametrize("steps", [0, 2])
def test_adapted_parameters_are_leaves_of_their_own(steps):
    initial = start()
    before = {name: value.detach().clone() for name, value in initial.items()}
    adapted = LEARNER.adapt(quartic, initial, EPISODES[0][0][:steps], STEP)
    assert all(value.is_leaf and value.requires_grad for value in adapted.values())
    with torch.no_grad():
        adapted["w"] += 1
    for name, value in initial.items():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_backends_are_called_by_name():
    assert isinstance(get_learner("torch"), TorchLearner)
    with pytest.raises(ValueError, match="'jax'.*'torch', 'learn2learn'"):
        get_learner("jax")
