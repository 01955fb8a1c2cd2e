import pytest
import torch

from anomalib_metarefine.density.flow import PatchFlow
from anomalib_metarefine.meta.algorithms import ALGORITHMS, Algorithm, get_algorithm, initialise
from anomalib_metarefine.refinement.engine import trainable

BLOCKS = 3


@pytest.fixture
def flow():
    return PatchFlow(8, blocks=BLOCKS, hidden=4)


def initialised(flow, algorithm):
    learned = {name: value for name, value in flow.named_parameters() if value.requires_grad}
    return initialise(learned, algorithm, 0.1, lambda name: flow.in_last_blocks(name, algorithm.last_blocks))


def test_frozen_permutations_stay_out(flow):
    assert trainable(flow).keys() == initialised(flow, get_algorithm("maml")).parameters.keys()
    assert not any("w_perm" in name for name in trainable(flow))


@pytest.mark.parametrize("name", ["maml", "fomaml", "pretraining"])
def test_all_parameters_share_a_constant_step_size(flow, name):
    start = initialised(flow, get_algorithm(name))
    assert start.step_sizes.keys() == start.parameters.keys()
    for size in start.step_sizes.values():
        assert size.shape == ()
        assert size.item() == pytest.approx(0.1)
        assert not size.requires_grad


def test_meta_sgd_learns_a_step_size_for_every_weight(flow):
    start = initialised(flow, get_algorithm("metasgd"))
    assert start.step_sizes.keys() == start.parameters.keys()
    for name, size in start.step_sizes.items():
        assert size.shape == start.parameters[name].shape
        assert (size == 0.1).all()
        assert size.requires_grad
        assert size.is_leaf


@pytest.mark.parametrize("count", range(1, BLOCKS + 2))
def test_only_the_last_blocks_adapt(flow, count):
    start = initialised(flow, Algorithm(last_blocks=count))
    share = min(count, BLOCKS) / BLOCKS  # all blocks have equally many parameters
    assert len(start.step_sizes) == share * len(start.parameters)
    assert list(start.step_sizes) == list(start.parameters)[-len(start.step_sizes) :]


def test_anil_moves_nothing_but_the_end_of_the_flow(flow):
    adapting = initialised(flow, get_algorithm("anil")).step_sizes
    blocks = list(flow.couplings.module_list)
    last = {id(value) for value in blocks[-1].parameters()}
    assert {name for name, value in flow.named_parameters() if value.requires_grad and id(value) in last} == {*adapting}


def test_step_sizes_have_the_type_of_the_parameters(flow):
    for algorithm in ALGORITHMS.values():
        sizes = initialised(flow.double(), algorithm).step_sizes.values()
        assert {size.dtype for size in sizes} == {torch.float64}


def test_algorithms_are_called_by_name():
    assert get_algorithm("fomaml").first_order
    assert not get_algorithm("pretraining").adapts
    with pytest.raises(ValueError, match=r"'mamal'.*'anil', 'fomaml', 'maml', 'metasgd', 'pretraining'"):
        get_algorithm("mamal")
