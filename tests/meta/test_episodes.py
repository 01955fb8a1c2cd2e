import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.density.flow import position_code
from anomalib_metarefine.meta.episodes import Category, PatchBatch, dirty, draw_batch, draw_episode, draw_patches

POSITIONS = position_code(2, 3)


def numbered(count):
    """Every patch carries the number of its image, so that one can tell where it comes from."""
    return Category(torch.arange(float(count)).view(count, 1, 1).expand(count, 6, 4), POSITIONS)


def draw(category, inner_steps=2, seed=0, support_images=4, batch_patches=64):
    return draw_episode(category, support_images, inner_steps, batch_patches, torch.Generator().manual_seed(seed))


def sources(patches):
    """Images of the patches that are as they were."""
    return set(patches[(patches == patches[:, :1]).all(1), 0].tolist())


@given(count=st.integers(2, 30), support_images=st.integers(1, 30))
@settings(deadline=None)
def test_support_and_query_come_from_different_images(count, support_images):
    episode = draw(numbered(count), 3, support_images=support_images)
    support = set().union(*(sources(batch.patches) for batch in episode.support))
    assert len(episode.support) == 3
    assert 0 < len(support) <= min(support_images, count // 2)
    assert sources(episode.query.patches)
    assert not sources(episode.query.patches) & support


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_stated_share_of_patches_is_dirtied(rate):
    batch = PatchBatch(torch.randn(200, 5), torch.zeros(200, 16))
    result = dirty(batch, rate, torch.Generator().manual_seed(0))
    changed = (result.patches != batch.patches).any(1)
    assert changed.sum().item() == pytest.approx(rate * 200, abs=5)  # a patch may be pasted onto itself
    pasted = (result.patches.unsqueeze(1) == batch.patches).all(2).any(1) & changed
    assert pasted.sum().item() == pytest.approx(rate * 100, abs=5)


def test_one_image_is_support_and_query():
    episode = draw(Category(torch.randn(1, 6, 4), POSITIONS), 1, batch_patches=8)
    assert len(episode.query.patches) == 8
    assert len(episode.support) == 1


def test_the_query_is_as_it_was():
    for seed in range(10):
        query = draw(numbered(10), seed=seed).query
        assert (query.patches == query.patches[:, :1]).all()


def test_support_sets_are_dirtied_at_rates_up_to_two_fifths():
    shares = []
    for seed in range(200):
        support = [batch.patches for batch in draw(numbered(10), seed=seed, batch_patches=100).support]
        noisy = [(patches != patches[:, :1]).any(1).float().mean().item() for patches in support]
        assert noisy[0] == noisy[1]  # one rate in an episode; half of the dirt, the other half is pasted
        assert not torch.equal(*support)
        shares.append(2 * noisy[0])
    assert 0.36 < max(shares) <= 0.41
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("rows", [[0], [2, 5]])
def test_a_batch_is_of_the_images_asked_for(rows):
    batch = draw_batch(*numbered(6)[:2], torch.tensor(rows), 50, torch.Generator().manual_seed(0))
    assert sources(batch.patches) == set(rows)
    assert len(batch.positions.unique(dim=0)) == len(POSITIONS)


def test_only_usable_patches_are_drawn_each_with_its_own_position():
    place = torch.arange(6.0)
    images = 10 * torch.arange(5.0).view(5, 1, 1) + place.view(1, 6, 1)
    positions = place.view(6, 1).expand(6, 16)
    usable = torch.tensor([[0, 3], [4, 1], [2, 2]])
    batch = draw_patches(images, positions, usable, 60, torch.Generator().manual_seed(0))
    assert set(batch.patches.flatten().tolist()) == {3, 41, 22}
    assert torch.equal(batch.patches.squeeze(1) % 10, batch.positions[:, 0])


def test_same_seed_same_episode():
    first, second, other = (draw(numbered(10), seed=seed) for seed in (0, 0, 1))
    for one, two in zip([*first.support, first.query], [*second.support, second.query], strict=True):
        assert torch.equal(one.patches, two.patches)
    assert not torch.equal(first.query.patches, other.query.patches)
