import itertools

import numpy as np
import pytest
import torch

from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.features.store import FeatureStore

GRID = (3, 4)


def store(count: int, channels: int = 20, seed: int = 0) -> FeatureStore:
    generator = torch.Generator().manual_seed(seed)
    store = FeatureStore()
    store.add([f"{i}.png" for i in range(count)], torch.randn(count, 12, channels, generator=generator))
    return store


def compare(images: FeatureStore, **settings) -> NearestImages:
    return NearestImages(images, GRID, 0, **settings)


def nearest_in_window(images: torch.Tensor, i: int, j: int, patch: int, window: int) -> float:
    """By definition: patches of image j at most ``window`` rows and columns from the place of the patch of image i."""
    row, column = divmod(patch, GRID[1])
    near = [
        r * GRID[1] + c
        for r, c in itertools.product(range(GRID[0]), range(GRID[1]))
        if abs(r - row) <= window and abs(c - column) <= window
    ]
    return float((images[j, near] - images[i, patch]).norm(dim=1).min())


@pytest.mark.parametrize("window", [0, 1, 5])
def test_distances_are_those_of_the_definition(window):
    data = store(6)  # fewer channels than components: projection is a rotation
    found, images = compare(data, window=window), data.images()
    for i, patch in itertools.product(range(6), range(12)):
        expected = {j: nearest_in_window(images, i, j, patch, window) for j in range(6) if j != i}
        for distance, j in zip(found.distances[i, patch], found.images[i, patch], strict=True):
            if np.isfinite(distance):
                assert distance == pytest.approx(expected[j], rel=2e-3)
        assert sorted(expected, key=expected.get) == found.images[i, patch][:5].tolist()


def test_episodes_in_closed_form_agree_with_drawn_ones():
    data = store(7)
    found, images = compare(data), data.images()
    kept = np.array([True, True, False, True, True, True, True])
    mean, deviation = found.episodic(kept)
    others = [j for j in range(7) if kept[j] and j != 0]
    distances = np.array([nearest_in_window(images, 0, j, 5, 1) for j in others])
    rng = np.random.default_rng(0)
    drawn = [distances[chosen].min() for chosen in rng.random((20_000, len(others))) < 0.5 if chosen.any()]
    assert mean[0, 5].item() == pytest.approx(np.mean(drawn), rel=0.01)
    assert deviation[0, 5].item() == pytest.approx(np.std(drawn), rel=0.05)


def test_a_rejected_image_is_no_neighbour():
    data = FeatureStore()
    defect = torch.randn(1, 12, 20)
    good = torch.randn(1, 12, 20) + 0.01 * torch.randn(6, 12, 20)
    data.add([str(i) for i in range(8)], torch.cat([good, defect + 10, defect + 10.01]))
    found = compare(data)
    everything = found.episodic(np.ones(8, dtype=bool))[0].mean(1)
    assert everything[6] < found.episodic(np.arange(8) < 7)[0].mean(1)[6]  # its twin is gone
    alone = found.episodic(np.arange(8) < 6)[0].mean(1)
    assert alone[6:].min() > 10 * alone[:6].max()
    assert everything[6] < 0.8 * alone[6]


def test_more_images_than_references_or_neighbours_remembered():
    data = store(40)
    few = compare(data, references=10, nearest=3)
    assert few.distances.shape == (40, 12, 3)
    assert len(np.unique(few.images)) <= 10
    mean, deviation = few.episodic(np.zeros(40, dtype=bool))  # all of those remembered are rejected
    expected = np.where(np.isfinite(few.distances), few.distances, 0).max(-1)
    np.testing.assert_allclose(mean, expected, rtol=1e-3)
    np.testing.assert_array_equal(deviation, 0)


def test_one_image_has_no_neighbour():
    mean, deviation = compare(store(1)).episodic(np.array([True]))
    assert mean.tolist() == deviation.tolist() == [[0] * 12]


def test_memory_mapped_store_and_progress():
    done = []
    held, spilled = store(40), FeatureStore(memory_limit_mb=0)
    spilled.add(held.paths, held.images())
    expected, found = compare(held, on_images=done.append), compare(spilled)
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert sum(done) == 40


def test_features_of_any_size_have_a_distance():
    data = FeatureStore()
    data.add(["a", "b", "c"], torch.tensor([0.0, 5_000, -40_000])[:, None, None].expand(3, 12, 20))
    mean, _ = compare(data).episodic(np.ones(3, dtype=bool))
    assert (mean[2] > mean[0]).all()
    assert mean.isfinite().all()


def test_tells_images_that_lie_alike_from_those_that_do_not():
    generator = torch.Generator().manual_seed(0)
    part, noise = torch.randn(12, 20, generator=generator), 0.1 * torch.randn(30, 12, 20, generator=generator)
    alike, anywhere = FeatureStore(), FeatureStore()
    alike.add([str(i) for i in range(30)], part + noise)
    rolled = [torch.roll(part, i, 0) for i in range(30)]  # the same patches, at another place in every image
    anywhere.add([str(i) for i in range(30)], torch.stack(rolled) + noise)
    one = np.zeros(30, dtype=int)
    assert compare(alike).layouts(one)[0] > 0.95
    assert compare(anywhere).layouts(one)[0] < 0.2


def test_the_same_references_for_the_same_seed():
    first, again = (compare(store(40), references=10) for _ in range(2))
    np.testing.assert_array_equal(first.images, again.images)
    other = NearestImages(store(40), GRID, 1, references=10)
    assert set(np.unique(other.images)) != set(np.unique(first.images))


def test_distance_of_an_image_is_that_of_its_most_distant_patches():
    found, kept = compare(store(6)), np.ones(6, dtype=bool)
    mean = found.episodic(kept)[0]
    np.testing.assert_allclose(found.image_distances([kept], 1.0)[0], mean.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.keep_distances(kept, 1e-6), mean.max(1).values, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 5])
def test_ignored_places_are_compared_with_nothing(window):
    everything = store(6).images()
    looked = np.ones(12, dtype=bool)
    looked[[0, 5, 6, 11]] = False
    data, hidden = FeatureStore(), everything.clone()
    data.add([f"{i}.png" for i in range(6)], everything[:, looked])
    hidden[:, ~looked] = 1e6
    found = compare(data, window=window, looked=looked)
    assert found.distances.shape[1] == 8
    for i, (row, patch) in itertools.product(range(6), enumerate(np.flatnonzero(looked))):
        expected = {j: nearest_in_window(hidden, i, j, patch, window) for j in range(6) if j != i}
        nearest = found.images[i, row][:5].tolist()
        assert nearest == sorted(expected, key=expected.get)
        assert found.distances[i, row, 0] == pytest.approx(expected[nearest[0]], rel=2e-3)


def test_shares_of_the_patches_whose_nearest_image_is_of_a_group():
    found = compare(store(40), references=10)
    nearest = found.nearest_references()
    assert nearest.shape == (10, 10)
    np.testing.assert_allclose(nearest.sum(1), 1)
    assert not nearest.diagonal().any()
    groups = np.arange(40)[:, None] == found.chosen
    shares = found.share_nearest(groups)
    assert shares.shape == (40, 10)
    np.testing.assert_allclose(shares[found.chosen], nearest)
    everyone = np.ones((40, 1), dtype=bool)
    np.testing.assert_array_equal(found.share_nearest(everyone), 1)
