import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.density.flow import PatchFlow, bits_per_dimension, position_code


def random_flow(dimensions: int, seed: int = 0) -> PatchFlow:
    """A flow far from the identity, in double precision."""
    torch.manual_seed(seed)
    flow = PatchFlow(dimensions, blocks=3, hidden=16).double()
    for name, value in flow.named_parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=1.0 if "subnet" in name else 0.3)
    return flow


@given(st.integers(2, 9), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_inverse_undoes_forward(dimensions, seed):
    flow, x, c = random_flow(dimensions, seed), torch.randn(12, dimensions).double(), position_code(3, 4).double()
    torch.testing.assert_close(flow.inverse(flow(x, c)[0], c), x, atol=1e-8, rtol=1e-6)


@given(st.integers(2, 9), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_log_det_is_that_of_the_jacobian(dimensions, seed):
    flow, x, c = random_flow(dimensions, seed), torch.randn(1, dimensions).double(), position_code(1, 1).double()
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, c)[0], x).reshape(dimensions, dimensions)
    torch.testing.assert_close(flow(x, c)[1][0], torch.linalg.slogdet(jacobian)[1])


def test_untrained_flow_is_a_standard_normal():
    x, c = torch.randn(6, 8), position_code(2, 3)
    expected = -torch.distributions.Normal(0, 1).log_prob(x).sum(1) / (8 * math.log(2))
    torch.testing.assert_close(PatchFlow(8).bits(x, c), expected)


def test_conditioning_on_the_position_matters_after_training():
    flow, x = random_flow(4), torch.randn(1, 4).double().expand(6, 4)
    assert flow.bits(x, position_code(2, 3).double()).std() > 0


def test_bits_integrate_to_one():
    grid = torch.linspace(-8, 8, 400)
    density = 2 ** -bits_per_dimension(grid.unsqueeze(1), torch.zeros(400))
    assert torch.trapezoid(density, grid) == pytest.approx(1, abs=1e-4)


def test_position_codes_differ_and_do_not_depend_on_the_resolution():
    assert len(position_code(16, 20).unique(dim=0)) == 320
    # the centre of the second of three cells is that of the fifth of nine
    torch.testing.assert_close(position_code(3, 3)[4], position_code(9, 9)[40])


def test_a_flow_can_be_pickled_and_is_the_scale_is_that_of_freia():
    flow = random_flow(5)
    block = flow.couplings.module_list[0]
    fresh = type(block)([(5,)], dims_c=[(16,)], subnet_constructor=torch.nn.Linear).double()
    scale = torch.randn(1, 5).double()
    torch.testing.assert_close(block.global_scale_activation(scale), fresh.global_scale_activation(scale))
    again = pickle.loads(pickle.dumps(flow.couplings.module_list[0].global_scale_activation))
    torch.testing.assert_close(again(scale), fresh.global_scale_activation(scale))
