import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.density.flow import position_code
from anomalib_metarefine.meta.episodes import PatchBatch, dirty, draw_batch, draw_episode, draw_patches
from anomalib_metarefine.meta.training import Category, MetaSettings

POSITIONS = position_code(2, 3)


def numbered(count, synthetic=None):
    """Every patch carries the number of its image, so that one can tell where it comes from."""
    return Category(torch.arange(float(count)).view(count, 1, 1).expand(count, 6, 4), POSITIONS, synthetic)


def draw(category, inner_steps=2, seed=0, **chosen):
    chosen = MetaSettings(**{"support_images": 4, "batch_patches": 64, **chosen})
    return draw_episode(category, inner_steps, chosen, torch.Generator().manual_seed(seed))


def sources(patches):
    """Images of the patches that are as they were."""
    return set(patches[(patches == patches[:, :1]).all(1), 0].tolist())


@given(count=st.integers(2, 30), support_images=st.integers(1, 30), ranking=st.sampled_from([0.0, 1.0]))
@settings(deadline=None)
def test_support_and_query_come_from_different_images(count, support_images, ranking):
    episode = draw(numbered(count), 3, support_images=support_images, ranking=ranking)
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
    assert result.anomalous.sum() == rate * 200
    assert changed.sum().item() == pytest.approx(rate * 200, abs=5)  # a patch may be pasted onto itself
    assert not (changed & ~result.anomalous).any()


def test_synthetic_patches_come_with_their_positions():
    batch = PatchBatch(torch.zeros(100, 4), torch.zeros(100, 16))
    number = torch.arange(1.0, 4.0).unsqueeze(1)
    synthetic = PatchBatch(number.expand(3, 4), 10 * number.expand(3, 16))
    result = dirty(batch, 0.3, torch.Generator().manual_seed(0), synthetic)
    assert torch.equal((result.patches != 0).all(1), result.anomalous)
    assert set(result.patches[result.anomalous, 0].tolist()) == {1, 2, 3}
    assert torch.equal(result.positions, 10 * result.patches[:, :1].expand(100, 16))
    assert not batch.patches.any()  # left as it was
    assert not batch.positions.any()


def test_one_image_is_support_and_query():
    episode = draw(Category(torch.randn(1, 6, 4), POSITIONS), 1, batch_patches=8)
    assert len(episode.query.patches) == 8
    assert len(episode.support) == 1


def test_without_ranking_the_query_is_as_it_was():
    for seed in range(10):
        episode = draw(numbered(10), seed=seed)
        assert episode.query.anomalous is None
        assert (episode.query.patches == episode.query.patches[:, :1]).all()


def test_with_ranking_anomalies_are_marked_in_the_query_and_never_in_the_support():
    shares = []
    for seed in range(200):
        episode = draw(numbered(10), seed=seed, ranking=0.5)
        assert all(batch.anomalous is None for batch in episode.support)
        normal = episode.query.patches[~episode.query.anomalous]
        assert (normal == normal[:, :1]).all()
        shares.append(episode.query.anomalous.float().mean().item())
    assert max(shares) <= 0.4
    assert max(shares) > 0.36
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.03)


def test_an_episode_has_one_contamination_rate_and_other_patches_in_every_step():
    synthetic = PatchBatch(torch.full((1, 4), -1.0), torch.zeros(1, 16))
    for seed in range(10):
        episode = draw(numbered(10, synthetic), 3, seed, ranking=1.0)
        batches = [*episode.support, episode.query]
        assert len({int((batch.patches == -1).all(1).sum()) for batch in batches}) == 1
        assert torch.equal(episode.query.anomalous, (episode.query.patches == -1).all(1))
        assert not torch.equal(episode.support[0].patches, episode.support[1].patches)


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
    assert batch.anomalous is None


def test_same_seed_same_episode():
    first, second, other = (draw(numbered(10), seed=seed, ranking=1.0) for seed in (0, 0, 1))
    for one, two in zip([*first.support, first.query], [*second.support, second.query], strict=True):
        assert torch.equal(one.patches, two.patches)
    assert not torch.equal(first.query.patches, other.query.patches)
