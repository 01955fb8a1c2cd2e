"""Meta-training on a toy problem: patches of a category lie around a centre, which is what there is to learn."""

import pytest
import torch

from anomalib_metarefine.density.flow import position_code
from anomalib_metarefine.meta.algorithms import ALGORITHMS, get_algorithm, initialise
from anomalib_metarefine.meta.training import Category, MetaSettings, meta_train

STEPS = 40


def category(centre, noise=0.05):
    generator = torch.Generator().manual_seed(1)
    return Category(centre + noise * torch.randn(12, 6, 2, generator=generator), position_code(2, 3))


def start(algorithm):
    parameters = {"body": torch.zeros(2, requires_grad=True), "head": torch.zeros(2, requires_grad=True)}
    return initialise(parameters, get_algorithm(algorithm), 0.1, lambda name: name == "head")


def distance(parameters, batch):
    """Median rather than mean, as dirtied patches of the support set are far away."""
    return (batch.patches - parameters["body"] - parameters["head"]).square().median(0).values.sum()


def train(algorithm, categories, loss=distance, seed=0, initial=None, **chosen):
    told = []
    chosen = {"meta_steps": STEPS, "meta_lr": 0.05, "support_images": 4, "batch_patches": 32, **chosen}
    learned = meta_train(
        categories,
        initial or start(algorithm),
        loss,
        MetaSettings(meta_algorithm=algorithm, **chosen),
        torch.Generator().manual_seed(seed),
        lambda step, query_loss: told.append((step, query_loss)),
    )
    return learned, told


def copies(initialisation):
    return [{name: value.detach().clone() for name, value in values.items()} for values in initialisation]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_query_loss_falls_and_the_start_stays(algorithm):
    initial = start(algorithm)
    before = copies(initial)
    learned, told = train(algorithm, [category(1.0)], initial=initial)
    assert [step for step, _ in told] == list(range(STEPS))
    losses = [loss for _, loss in told]
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    torch.testing.assert_close(copies(initial), before, rtol=0, atol=0)
    assert all(value.grad is None for values in initial for value in values.values())
    assert learned.parameters.keys() == initial.parameters.keys()
    assert all(value.is_leaf and value.requires_grad for value in learned.parameters.values())
    assert not torch.equal(learned.parameters["body"], initial.parameters["body"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_step_sizes_move_only_where_they_are_learned(algorithm):
    learned, _ = train(algorithm, [category(1.0)])
    assert learned.step_sizes.keys() == ({"head"} if algorithm == "anil" else {"body", "head"})
    for size in learned.step_sizes.values():
        if algorithm == "metasgd":
            assert size.requires_grad
            assert size.is_leaf
            assert (size != 0.1).all()
        else:
            assert not size.requires_grad
            assert size.item() == pytest.approx(0.1)


def test_learned_step_sizes_adapt_further_where_categories_differ():
    """No initialisation is right for both centres: the inner steps must get there."""
    both = [category(-1.0), category(1.0)]
    last = {name: sum(loss for _, loss in train(name, both)[1][-5:]) for name in ("pretraining", "maml", "metasgd")}
    assert last["metasgd"] < last["maml"] < last["pretraining"]


def test_categories_are_drawn_in_turn_across_steps():
    drawn = []

    def loss(parameters, batch):
        drawn.append(round(batch.patches.mean().item()))
        return distance(parameters, batch)

    train("pretraining", [category(0.0), category(10.0)], loss, meta_steps=2, episodes=3)
    assert drawn == [0, 10, 0, 10, 0, 10]


@pytest.mark.parametrize(("algorithm", "inner_steps"), [("maml", 3), ("anil", 3), ("pretraining", 0)])
def test_an_episode_has_its_inner_steps_and_pretraining_has_none(algorithm, inner_steps):
    calls = []

    def loss(parameters, batch):
        calls.append(batch.patches)
        return distance(parameters, batch)

    train(algorithm, [category(1.0)], loss, meta_steps=2, episodes=2, inner_steps=3)
    assert len(calls) == 2 * 2 * (inner_steps + 1)


@pytest.mark.parametrize("algorithm", ["maml", "metasgd"])
def test_same_seed_same_result(algorithm):
    (first, told), (second, again), (other, _) = (train(algorithm, [category(1.0)], seed=s) for s in (3, 3, 4))
    assert told == again
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(first.parameters["body"], other.parameters["body"])


def test_without_steps_it_is_the_start():
    initial = start("metasgd")
    learned, told = train("metasgd", [category(1.0)], initial=initial, meta_steps=0)
    assert told == []
    torch.testing.assert_close(copies(learned), copies(initial), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "value"), [("meta_algorithm", "mamal"), ("meta_backend", "jax")])
def test_wrong_names_are_named(name, value):
    with pytest.raises(ValueError, match=f"'{value}'"):
        meta_train([category(1.0)], start("maml"), distance, MetaSettings(**{name: value}), torch.Generator(), print)
