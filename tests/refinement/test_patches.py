import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from anomalib_metarefine.refinement.patches import Places, is_usual, keeps_order, usual_limit

SEEDS = st.integers(0, 2**32 - 1)
IMAGES = st.integers(80, 120)  # from 80 on, patches are looked at
FENCES = st.floats(0.1, 6)
distances_of = st.builds(
    # Random numbers from a seed: no two distances and no limit coincide, so that rounding decides nothing.
    lambda seed, images, places, spread: np.random.default_rng(seed).lognormal(0, spread, (images, places)),
    SEEDS,
    IMAGES,
    st.integers(1, 6),
    st.sampled_from([0.01, 0.3, 1.5]),
)


def usual_patches(distances, fence):
    return is_usual(distances, usual_limit(distances, fence))


def outside_regions(usual, grid, least):
    return Places(grid, None).outside_regions(usual, least)


@given(distances_of, FENCES, st.data())
@settings(deadline=None)
def test_the_unit_of_distance_of_a_place_does_not_matter(distances, fence, data):
    place = data.draw(st.integers(0, distances.shape[1] - 1))
    scaled = distances.copy()
    scaled[:, place] *= data.draw(st.floats(1e-4, 1e4))
    np.testing.assert_array_equal(usual_patches(scaled, fence), usual_patches(distances, fence))


@given(distances_of, st.integers(0, 3), st.floats(0, 6))
@settings(deadline=None)
def test_at_least_half_of_every_place_passes(distances, decimals, fence):
    distances = distances.round(decimals)  # with ties, and zeros
    usual = usual_patches(distances, fence)
    assert usual.shape == np.shape(distances)
    assert usual.dtype == bool
    assert (2 * usual.sum(0) >= len(distances)).all()


@given(distances_of, FENCES, SEEDS)
@settings(deadline=None)
def test_the_order_of_images_and_of_places_does_not_matter(distances, fence, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(distances.shape[0]), rng.permutation(distances.shape[1])
    shuffled = distances[rows][:, columns]
    np.testing.assert_array_equal(usual_patches(shuffled, fence), usual_patches(distances, fence)[rows][:, columns])


@given(distances_of, FENCES, st.floats(1.1, 3))
@settings(deadline=None)
def test_a_lower_fence_leaves_out_more(distances, fence, factor):
    assert not (usual_patches(distances, fence) & ~usual_patches(distances, factor * fence)).any()


@given(SEEDS, IMAGES, st.integers(1, 6))
@settings(deadline=None)
def test_one_far_patch_is_found_and_changes_nothing_at_other_places(seed, images, places):
    rng = np.random.default_rng(seed)
    distances = rng.lognormal(0, 0.2, (images, places))
    before = usual_patches(distances, 2.5)
    image, place = rng.integers(images), rng.integers(places)
    distances[image, place] = 1e3
    after = usual_patches(distances, 2.5)
    assert not after[image, place]
    others = np.arange(places) != place
    np.testing.assert_array_equal(after[:, others], before[:, others])


@pytest.mark.parametrize("dirty", [1, 16, 32])
def test_defects_of_up_to_40_percent_do_not_widen_the_fence(dirty):
    rng = np.random.default_rng(0)
    distances = rng.lognormal(0, 0.2, (80, 5))
    distances[:dirty, 2] = 20
    usual = usual_patches(distances, 2.5)
    assert not usual[:dirty, 2].any()
    assert usual.mean(0)[[0, 1, 3, 4]].min() > 0.9


def test_places_without_spread_pass_by_a_little_and_not_by_much():
    """Copies of one image are at distance 0, and rounding lifts some of them off it a little."""
    assert usual_patches(np.zeros((80, 3)), 2.5).all()
    distances = np.ones((80, 1))
    distances[:2] = [[1.05], [2.0]]
    assert (~usual_patches(distances, 2.5)).nonzero()[0].tolist() == [1]


@pytest.mark.parametrize("images", [1, 79])
def test_a_handful_of_images_is_left_whole(images):
    distances = np.ones((images, 4))
    distances[0] = 1e6
    assert usual_patches(distances, 2.5).all()


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def sparse_masks(draw):
    """Usual patches of some images, few or many of them not."""
    grid, images = draw(GRIDS), draw(st.integers(1, 6))
    share = draw(st.floats(0, 0.5))
    return np.random.default_rng(draw(SEEDS)).random((images, grid[0] * grid[1])) >= share, grid


class TestRegions:
    @given(sparse_masks(), st.integers(1, 8))
    @settings(deadline=None)
    def test_regions_and_what_is_around_them_are_left_out(self, masks, least):
        usual, grid = masks
        outside = outside_regions(usual, grid, least)
        regions = np.zeros((len(usual), *grid), dtype=bool)
        for image, odd in enumerate(~usual.reshape(-1, *grid)):
            labels, count = ndimage.label(odd, np.ones((3, 3)))
            for number in range(1, count + 1):
                regions[image] |= (labels == number) & ((labels == number).sum() >= least)
        wide = np.array([ndimage.binary_dilation(region, np.ones((3, 3))) for region in regions])
        crowded = wide.mean(0) > 0.5
        expected = ~np.where(crowded, regions, wide)
        np.testing.assert_array_equal(outside.reshape(-1, *grid), expected)

    @given(IMAGES, GRIDS, SEEDS)
    @settings(deadline=None)
    def test_at_least_half_of_every_place_stays(self, images, grid, seed):
        usual = usual_patches(np.random.default_rng(seed).lognormal(0, 1, (images, grid[0] * grid[1])), 0.1)
        assert (2 * outside_regions(usual, grid, 2).sum(0) >= images).all()

    def test_single_odd_patches_are_noise(self):
        usual = np.ones((3, 6, 6), dtype=bool)
        usual[0, ::2, ::2] = usual[1, 0, :4] = False
        assert outside_regions(usual.reshape(3, 36), (6, 6), 5).all()
        usual[1, 1, 4] = False  # the fifth, by a corner
        assert (~outside_regions(usual.reshape(3, 36), (6, 6), 5)).sum(1).tolist() == [0, 15, 0]


@given(
    st.lists(st.integers(-1000, 1000), min_size=3, max_size=50, unique=True).map(lambda values: np.array(values) / 200),
    st.sampled_from([np.exp, np.cbrt, np.arctan, lambda x: 3 * x - 7]),
)
@settings(deadline=None)
def test_a_monotone_transformation_keeps_the_order(scores, transformation):
    assert keeps_order(scores, transformation(scores))
    assert keeps_order(transformation(scores), scores)
    assert not keeps_order(scores, -transformation(scores))


@given(SEEDS, st.integers(30, 200))
@settings(deadline=None)
def test_unrelated_scores_do_not_keep_it(seed, count):
    before, after = np.random.default_rng(seed).normal(size=(2, count))
    assert not keeps_order(before, after)


def test_a_tenth_of_the_images_may_move():
    """What leaving out defects does: the images that had them rise to the top, all others stay."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=200)
    after = before + rng.normal(0, 0.05, 200)
    after[before.argsort()[-20:]] += 5
    assert keeps_order(before, after)
    assert not keeps_order(before, before + rng.normal(0, 1, 200))


@pytest.mark.parametrize("alike", [0, 1])
def test_scores_that_are_all_alike_have_no_order(alike):
    both = [np.arange(10.0), np.arange(10.0)]
    both[alike] = np.ones(10)
    assert not keeps_order(*both)
    assert not keeps_order(np.ones(1), np.ones(1))
