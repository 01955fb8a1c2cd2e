import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from anomalib_metarefine.features.backbone import normalization
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.meta.synthetic import SyntheticAnomalies, cut_and_paste

MEAN, STD = normalization(OFFLINE_BACKBONE)
KINDS = ["perlin", "cutpaste"]


class Embedding:
    """Mean colours of the patches of a grid: an embedding that one can look into."""

    def __init__(self, grid=(6, 4)):
        self.grid, self.seen = grid, []

    def __call__(self, images):
        self.seen.append(images)
        return F.adaptive_avg_pool2d(images, self.grid).flatten(2).transpose(1, 2), self.grid


def normalised(images):
    return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def textured(count, height=96, width=64):
    return normalised(torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@given(count=st.integers(1, 3), height=st.integers(1, 80), width=st.integers(1, 80))
@settings(deadline=None)
def test_cut_and_paste_moves_one_rectangle_and_marks_it(count, height, width):
    # Every pixel carries its number, so that what was moved is off by one and the same amount.
    numbers = torch.arange(1.0, 1 + height * width).view(1, 1, height, width).repeat(count, 2, 1, 1)
    before = numbers.clone()
    spoilt, masks = cut_and_paste(numbers)
    assert torch.equal(numbers, before)
    assert masks.shape == (count, 1, height, width)
    for image, result, mask in zip(numbers, spoilt, masks.bool(), strict=True):
        assert torch.equal(result[:, ~mask[0]], image[:, ~mask[0]])
        assert (result - image)[:, mask[0]].unique().numel() == 1
        rows, columns = mask[0].any(1).sum(), mask[0].any(0).sum()
        assert rows * columns == mask.sum()
        assert mask.sum() > 0


def test_cut_and_paste_is_of_the_size_and_shape_of_the_paper():
    _, masks = cut_and_paste(torch.zeros(200, 1, 96, 96))
    area = masks.mean((1, 2, 3))
    assert (area.min(), area.max()) == pytest.approx((0.02, 0.15), abs=0.01)
    aspect = masks.amax(3).sum((1, 2)) / masks.amax(2).sum((1, 2))
    assert (aspect.min(), aspect.max()) == pytest.approx((0.3, 3.3), rel=0.15)
    assert (aspect > 1).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_anomalous_patches_are_those_under_the_damage(kind):
    images, embed = textured(8), Embedding()
    anomalies = SyntheticAnomalies(kind, MEAN, STD)
    anomalies.add(images, embed)
    embeddings, places = anomalies.patches(10_000, torch.Generator())
    (spoilt,) = embed.seen
    touched = (spoilt - images).abs().amax(1, keepdim=True) > 1e-3
    assert 0.02 < touched.float().mean() < 0.5  # the rest comes back from normalisation as it went in
    share = F.adaptive_avg_pool2d(touched.float(), embed.grid).flatten(1)
    rows, columns = torch.where(share > 0.25)
    # Half of a patch, seen to be damaged, was; a posterised pixel may look as before, though.
    assert (share > 0.5).sum() <= len(places) <= (share > 0).sum()
    if kind == "cutpaste":
        assert places.sort().values.tolist() == columns.sort().values.tolist()
        expected = embed(spoilt)[0][rows, columns]
        assert {tuple(row) for row in embeddings.tolist()} == {tuple(row) for row in expected.tolist()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_embedding_belongs_to_its_place(kind):
    """Images whose patches are all of another colour: the spoilt patch is found again at the place given."""
    shades = torch.linspace(0, 1, 24).view(1, 1, 6, 4).expand(4, 3, 6, 4)
    images, embed = normalised(F.interpolate(shades, size=(96, 64))), Embedding()
    anomalies = SyntheticAnomalies(kind, MEAN, STD)
    anomalies.add(images, embed)
    embeddings, places = anomalies.patches(10_000, torch.Generator())
    everything = embed(embed.seen[0])[0]
    assert all(
        (everything[:, place] == patch).all(1).any() for patch, place in zip(embeddings, places.tolist(), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_32_images_are_spoilt_and_no_more(kind):
    anomalies, embed = SyntheticAnomalies(kind, MEAN, STD), Embedding()
    for _ in range(3):
        anomalies.add(textured(20), embed)
    assert [len(images) for images in embed.seen] == [20, 12]


def test_a_choice_of_patches_is_random_and_without_repetition():
    anomalies = SyntheticAnomalies("cutpaste", MEAN, STD)
    anomalies.add(textured(8), Embedding())
    everything = {tuple(patch) for patch in anomalies.patches(10_000, torch.Generator())[0].tolist()}
    first, again, other = (anomalies.patches(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first[0].shape == (5, 3)
    assert first[1].shape == (5,)
    assert len({tuple(patch) for patch in first[0].tolist()} & everything) == 5
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 96), (33, 150), (32, 32)])
def test_images_of_any_shape(kind, shape):
    anomalies, embed = SyntheticAnomalies(kind, MEAN, STD), Embedding((2, 3))
    anomalies.add(textured(4, *shape), embed)
    embeddings, places = anomalies.patches(100, torch.Generator())
    assert embed.seen[0].shape == (4, 3, *shape)
    assert embeddings.isfinite().all()
    assert ((places >= 0) & (places < 6)).all()


def test_damage_that_covers_no_patch_gives_no_anomalies():
    anomalies = SyntheticAnomalies("cutpaste", MEAN, STD)
    anomalies.add(textured(2), Embedding((1, 1)))
    embeddings, places = anomalies.patches(100, torch.Generator())
    assert embeddings.shape == (0, 3)
    assert places.shape == (0,)
