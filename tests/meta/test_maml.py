import pytest
import torch

from anomalib_metarefine.density.flow import PatchFlow, position_code
from anomalib_metarefine.meta.episodes import PatchBatch, dirty, draw_episode
from anomalib_metarefine.meta.maml import adapt, meta_gradient
from anomalib_metarefine.model.fitting import trainable


def quadratic(parameters, target):
    return 0.5 * (parameters["w"] - target).square().sum() + parameters["w"].pow(4).sum() / 4


def start():
    return {"w": torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)}


EPISODES = [([torch.tensor([1.0, 2.0])] * 2, torch.tensor([0.5, 1.0])), ([torch.tensor([-1.0, 0.0])], torch.zeros(2))]


def mean_query_loss(w, step_size):
    return sum(quadratic(adapt(quadratic, {"w": w}, s, step_size, create_graph=True), q) for s, q in EPISODES) / 2


def test_second_order_gradient_is_that_of_the_whole_computation():
    parameters = start()
    gradient, loss = meta_gradient(quadratic, parameters, EPISODES, 0.1)
    value = mean_query_loss(parameters["w"], 0.1)
    torch.testing.assert_close(gradient["w"], torch.autograd.grad(value, parameters["w"])[0])
    assert loss == pytest.approx(value.item())
    w, eps = parameters["w"].detach(), 1e-6
    for i, unit in enumerate(torch.eye(2, dtype=torch.float64)):  # and that of finite differences
        high, low = ((w + s * eps * unit).requires_grad_() for s in (1, -1))
        numeric = (mean_query_loss(high, 0.1) - mean_query_loss(low, 0.1)).item() / (2 * eps)
        assert gradient["w"][i].item() == pytest.approx(numeric, abs=1e-6)


def test_first_order_gradient_is_taken_at_the_adapted_parameters():
    parameters = start()
    gradient, _ = meta_gradient(quadratic, parameters, EPISODES[:1], 0.1, first_order=True)
    adapted = adapt(quadratic, parameters, EPISODES[0][0], 0.1)
    expected = torch.autograd.grad(quadratic(adapted, EPISODES[0][1]), adapted["w"])[0]
    torch.testing.assert_close(gradient["w"], expected)
    second, _ = meta_gradient(quadratic, parameters, EPISODES[:1], 0.1)
    assert not torch.allclose(second["w"], gradient["w"])


def test_adaptation_leaves_the_initialisation_alone():
    parameters = start()
    before = parameters["w"].detach().clone()
    adapt(quadratic, parameters, EPISODES[0][0], 0.1)
    torch.testing.assert_close(parameters["w"].detach(), before)


def test_frozen_permutations_stay_out():
    flow = PatchFlow(8)
    assert not any("w_perm" in name for name in trainable(flow))
    assert any("subnet" in name for name in trainable(flow))


def test_support_and_query_come_from_different_images():
    images = torch.arange(10.0).view(10, 1, 1).expand(10, 6, 4)  # every patch carries the number of its image
    episode = draw_episode(images, position_code(2, 3), 4, steps=3, size=64, generator=torch.Generator().manual_seed(0))
    query = set(episode.query.patches[:, 0].tolist())
    whole = [b.patches[(b.patches == b.patches[:, :1]).all(1), 0].tolist() for b in episode.support]
    assert query
    assert not query & {value for batch in whole for value in batch}


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_stated_share_of_patches_is_dirtied(rate):
    batch = PatchBatch(torch.randn(200, 5), torch.zeros(200, 16))
    changed = (dirty(batch, rate, torch.Generator().manual_seed(0)).patches != batch.patches).any(1).sum().item()
    assert changed == pytest.approx(rate * 200, abs=5)  # a patch may be pasted onto itself


def test_one_image_is_support_and_query():
    episode = draw_episode(torch.randn(1, 6, 4), position_code(2, 3), 4, 1, 8, torch.Generator())
    assert len(episode.query.patches) == 8
