"""Against losses whose Hessian is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.loss_surface import largest_eigenvalue, random_direction, rises, surface


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(parameters):
    return torch.cat([parameters["w"].flatten(), parameters["b"]])


def quadratic(parameters, batch):
    """Slope ``s`` and Hessian ``H`` over the six entries of ``w`` ``[2 x 2]`` and ``b`` ``[2]``."""
    hessian, slope = batch
    x = flat(parameters)
    return 0.5 * x @ hessian @ x + slope @ x


def with_eigenvalues(values, seed=0):
    """A symmetric matrix with these eigenvalues, and a slope."""
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=gen(seed), dtype=torch.float64))
    return rotation @ torch.diag(torch.tensor(values).double()) @ rotation.T, torch.full((6,), 3.0).double()


def point(seed=0):
    x = torch.randn(6, generator=gen(seed), dtype=torch.float64)
    return {"w": x[:4].reshape(2, 2).requires_grad_(), "b": x[4:].requires_grad_()}


def test_rows_are_as_long_as_those_of_the_reference_and_point_anywhere():
    reference = {"w": torch.randn(5, 3, 2, generator=gen()), "zero": torch.zeros(4, 7)}
    one, two = (random_direction(reference, gen(seed)) for seed in (1, 2))
    torch.testing.assert_close(one["w"].flatten(1).norm(dim=1), reference["w"].flatten(1).norm(dim=1))
    assert (one["zero"] == 0).all()
    cosines = torch.cosine_similarity(one["w"].flatten(1), two["w"].flatten(1))
    assert cosines.abs().max() < 0.99
    torch.testing.assert_close(random_direction(reference, gen(1))["w"], one["w"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6), st.floats(0.01, 3), st.integers(0, 1000), st.booleans())
def test_rises_are_those_of_the_quadratic_whatever_its_slope(values, radius, seed, only_weights):
    batch, centre = with_eigenvalues(values, seed), point(seed)
    moved = {"w": centre["w"]} if only_weights else centre
    directions = [random_direction(moved, gen(seed + k)) for k in range(3)]
    steps = torch.stack([flat({"b": torch.zeros(2).double(), **d}) for d in directions])
    expected = 0.5 * radius**2 * torch.einsum("ki,ij,kj->k", steps, batch[0], steps)
    torch.testing.assert_close(rises(quadratic, centre, batch, directions, radius), expected, atol=1e-9, rtol=1e-9)


def test_mean_rise_tells_the_trace():
    centre = {"w": torch.tensor([[3.0, 4.0]]).double()}
    directions = [random_direction(centre, gen(k)) for k in range(4000)]
    found = rises(lambda p, h: 0.5 * (h * p["w"] ** 2).sum(), centre, torch.tensor([1.0, 7.0]), directions, 2.0)
    assert found.mean().item() == pytest.approx(0.5 * 4 * 25 * (1 + 7) / 2, rel=0.03)  # r^2 / 2 * |w|^2 * trace / n


def test_surface_is_the_loss_over_its_centre():
    batch, centre = with_eigenvalues([1.0, 2, 3, 4, 5, 6]), point()
    axes = random_direction(centre, gen(1)), random_direction(centre, gen(2))
    steps = [-1.0, 0.0, 0.5]
    found = surface(quadratic, centre, batch, axes, steps)
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            there = {name: centre[name] + a * axes[0][name] + b * axes[1][name] for name in centre}
            assert found[i, j].item() == pytest.approx((quadratic(there, batch) - quadratic(centre, batch)).item())
    assert found[1, 1] == 0
    assert not found.requires_grad


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3, 4, 5, 6],
        [-9, -1, 0, 1, 2, 3],  # the largest by magnitude is not the largest
        [-3, 0, 0, 0, 0, 3],  # power iteration would never settle
        [2.9, 2.95, 3, 3, 3, 3],
        [-6, -5, -4, -3, -2, -1],
    ],
)
def test_largest_eigenvalue_of_a_quadratic(values):
    found = largest_eigenvalue(quadratic, point(), with_eigenvalues([float(v) for v in values]), gen())
    assert found == pytest.approx(max(values), rel=2e-3)


def test_largest_eigenvalue_where_the_hessian_depends_on_the_place():
    def loss(p, _batch):
        return (p["w"] ** 4).sum() / 12 + 0.5 * p["w"].prod() + 5 * p["b"].sum()  # no second derivative in b

    parameters = {"w": torch.tensor([1.0, 3.0]), "b": torch.tensor([1.0])}
    hessian = torch.tensor([[1.0, 0.5], [0.5, 9.0]])
    expected = torch.linalg.eigvalsh(hessian)[-1].item()
    assert largest_eigenvalue(loss, parameters, None, gen()) == pytest.approx(expected, rel=2e-3)
    assert not parameters["w"].requires_grad  # left as they were
