"""Meta-training on a toy problem: patches of a category lie around a centre, which is what there is to learn."""

import pytest
import torch

from anomalib_metarefine.density.flow import position_code
from anomalib_metarefine.meta.episodes import Category
from anomalib_metarefine.meta.training import meta_train
from anomalib_metarefine.settings import Settings

STEPS = 40


def category(centre, noise=0.05):
    generator = torch.Generator().manual_seed(1)
    return Category(centre + noise * torch.randn(12, 6, 2, generator=generator), position_code(2, 3))


def start():
    return {"body": torch.zeros(2, requires_grad=True), "head": torch.zeros(2, requires_grad=True)}


def distance(parameters, batch):
    """Median rather than mean, as dirtied patches of the support set are far away."""
    return (batch.patches - parameters["body"] - parameters["head"]).square().median(0).values.sum()


def train(algorithm, categories, loss=distance, seed=0, initial=None, **chosen):
    told = []
    chosen = {"meta_steps": STEPS, "meta_lr": 0.05, "support_images": 4, "batch_patches": 32, **chosen}
    learned = meta_train(
        categories,
        initial or start(),
        loss,
        Settings(meta_algorithm=algorithm, **chosen),
        torch.Generator().manual_seed(seed),
        lambda step, query_loss: told.append((step, query_loss)),
    )
    return learned, told


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "pretraining"])
def test_the_query_loss_falls_and_the_start_stays(algorithm):
    initial = start()
    learned, told = train(algorithm, [category(1.0)], initial=initial)
    assert [step for step, _ in told] == list(range(STEPS))
    losses = [loss for _, loss in told]
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])
    assert all((value == 0).all() and value.grad is None for value in initial.values())
    assert learned.keys() == initial.keys()
    assert all(value.is_leaf and value.requires_grad for value in learned.values())
    assert (learned["body"] != 0).all()


def test_adapting_helps_where_categories_differ():
    """No initialisation is right for both centres: the inner steps must get there."""
    both = [category(-1.0), category(1.0)]
    last = {name: sum(loss for _, loss in train(name, both)[1][-5:]) for name in ("pretraining", "maml")}
    assert last["maml"] < last["pretraining"]


def test_categories_are_drawn_in_turn_across_steps():
    drawn = []

    def loss(parameters, batch):
        drawn.append(round(batch.patches.mean().item()))
        return distance(parameters, batch)

    train("pretraining", [category(0.0), category(10.0)], loss, meta_steps=2, episodes=3)
    assert drawn == [0, 10, 0, 10, 0, 10]


@pytest.mark.parametrize(("algorithm", "inner_steps"), [("maml", 3), ("fomaml", 3), ("pretraining", 0)])
def test_an_episode_has_its_inner_steps_and_pretraining_has_none(algorithm, inner_steps):
    calls = []

    def loss(parameters, batch):
        calls.append(batch.patches)
        return distance(parameters, batch)

    train(algorithm, [category(1.0)], loss, meta_steps=2, episodes=2, inner_steps=3)
    assert len(calls) == 2 * 2 * (inner_steps + 1)


def test_same_seed_same_result():
    (first, told), (second, again), (other, _) = (train("maml", [category(1.0)], seed=s) for s in (3, 3, 4))
    assert told == again
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["body"], other["body"])


def test_without_steps_it_is_the_start():
    learned, told = train("maml", [category(1.0)], meta_steps=0)
    assert told == []
    assert all((value == 0).all() for value in learned.values())


@pytest.mark.parametrize(("name", "value"), [("meta_algorithm", "mamal"), ("meta_backend", "jax")])
def test_wrong_names_are_named(name, value):
    with pytest.raises(ValueError, match=f"'{value}'"):
        meta_train([category(1.0)], start(), distance, Settings(**{name: value}), torch.Generator(), print)
