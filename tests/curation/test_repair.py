"""Repair: an unusual region is replaced by the same place of the image that fits best, and nothing else changes."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

from anomalib_metarefine.curation.repair import Repairer, encoded, read_pixels, regions

GRID = (8, 10)
SIZE = (80, 120)  # height and width: patches of 10 x 12 pixels
SPOT = (slice(30, 40), slice(48, 60))  # the pixels of patch (3, 4)


def scene(brightness=100.0, stripes=1.0, seed=0):
    """A part with its own brightness and noise; all of them have the same stripes, or others."""
    across = 30 * np.sin(stripes * np.arange(SIZE[1]) / 5)
    noise = np.random.default_rng(seed).normal(0, 2, SIZE)
    return (brightness + across[None] + noise).clip(0, 255)


def save(folder, images, suffix=".png", dtype=np.uint8):
    paths = []
    for number, image in enumerate(images):
        paths.append(folder / f"{number}{suffix}")
        paths[-1].write_bytes(encoded(image.astype(dtype), suffix))
    return paths


def masks(count, *places):
    """Unusual patches, and those around them, as refinement has them."""
    found = np.zeros((count, *GRID), dtype=bool)
    for place in places:
        found[place] = True
    return ndimage.binary_dilation(found, np.ones((1, 3, 3)))


@pytest.fixture
def spoilt(tmp_path):
    """Five parts of which the first has a dark spot, and what it would look like without."""
    images = [scene(100, seed=0), *(scene(level, seed=level) for level in (60, 90, 140, 180))]
    clean = images[0].copy()
    images[0][SPOT] = 5
    return save(tmp_path, images), clean


def test_the_spot_is_gone_and_what_is_far_from_it_is_untouched(spoilt):
    paths, clean = spoilt
    repaired = Repairer(paths, masks(5, (0, 3, 4))).repair(0)
    before = read_pixels(paths[0])
    assert np.abs(repaired.image[SPOT].astype(float) - clean[SPOT]).mean() < 4  # two noises of deviation 2
    assert np.abs(before[SPOT].astype(float) - clean[SPOT]).mean() > 60
    near = np.zeros(SIZE, dtype=bool)
    near[5:65, 12:96] = True  # the widened region and what fades around it
    assert (repaired.image[~near] == before[~near]).all()
    assert repaired.image.dtype == np.uint8
    [transplant] = repaired.transplants
    assert transplant[:4] == (36, 20, 36, 30)
    assert repaired.left == 0


def test_an_image_without_unusual_patches_stays_as_it_is(spoilt):
    paths, _ = spoilt
    repaired = Repairer(paths, masks(5, (0, 3, 4))).repair(1)
    assert (repaired.image == read_pixels(paths[1])).all()
    assert repaired.transplants == []


def test_the_donor_is_the_one_whose_surroundings_fit(tmp_path):
    images = [scene(100, 1, 0), scene(100, 3, 1), scene(100, 1, 2), scene(100, 2, 3)]
    paths = save(tmp_path, images)
    assert Repairer(paths, masks(4, (0, 3, 4))).repair(0).transplants[0].donor == paths[2]


def test_what_lies_in_the_region_itself_does_not_matter(tmp_path):
    images = [scene(100, 1, 0), scene(100, 3, 1), scene(100, 1, 2)]
    for spoilt in images[:2]:
        spoilt[20:50, 36:72] = 5
    paths = save(tmp_path, images)
    assert Repairer(paths, masks(3, (0, 3, 4))).repair(0).transplants[0].donor == paths[2]


def test_what_sticks_out_of_its_patch_is_gone_too(tmp_path):
    images = [scene(100, seed=seed) for seed in range(3)]
    clean, around = images[0].copy(), (slice(26, 44), slice(43, 65))
    images[0][around] = 5
    repaired = Repairer(save(tmp_path, images), masks(3, (0, 3, 4))).repair(0).image
    assert np.abs(repaired[around].astype(float) - clean[around]).max() < 15


def test_the_most_spoilt_come_first(spoilt):
    paths, _ = spoilt
    assert Repairer(paths, masks(5, (1, 3, 4), (3, 3, slice(4, 7)), (4, 2, slice(3, 5)))).spoilt == [3, 4, 1]


def test_no_donor_is_unusual_in_the_region_itself(spoilt):
    paths, _ = spoilt
    best = Repairer(paths, masks(5, (0, 3, 4))).repair(0).transplants[0].donor
    index = paths.index(best)
    assert Repairer(paths, masks(5, (0, 3, 4), (index, 5, 6))).repair(0).transplants[0].donor != best
    assert Repairer(paths, masks(5, (0, 3, 4), (index, 7, 9))).repair(0).transplants[0].donor == best


@pytest.mark.parametrize(
    "places",
    [
        [(slice(None), 3, 4)],  # all images are unusual there
        [(0, slice(0, 4), slice(None))],  # five of the eight rows, widened
    ],
)
def test_what_can_t_be_repaired_is_left(spoilt, places):
    paths, _ = spoilt
    repaired = Repairer(paths, masks(5, *places)).repair(0)
    assert repaired.left == 1
    assert repaired.transplants == []
    assert (repaired.image == read_pixels(paths[0])).all()


def test_regions_are_repaired_one_by_one(spoilt):
    paths, _ = spoilt
    repaired = Repairer(paths, masks(5, (0, 1, 1), (0, 6, 8), (slice(None), 6, 8))).repair(0)
    assert [t[:4] for t in repaired.transplants] == [(0, 0, 36, 30)]
    assert repaired.left == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 1), (np.uint16, 200), (np.int32, 5000), (np.float32, 0.01)])
def test_any_depth_and_channels(tmp_path, channels, dtype, scale):
    parts = [scene(level, seed=level) for level in (100, 60, 140)]
    parts[0][SPOT] = 5
    images = [np.squeeze(np.stack([scale * part] * channels, 2)) for part in parts]
    paths = save(tmp_path, images, ".tiff", dtype)
    repaired = Repairer(paths, masks(3, (0, 3, 4))).repair(0).image
    assert (repaired.shape, repaired.dtype) == (images[0].shape, dtype)
    assert repaired[SPOT].mean() / scale > 60


def test_donors_are_of_the_same_kind(tmp_path):
    grey = save(tmp_path, [scene(100)])
    colour = tmp_path / "colour.png"
    colour.write_bytes(encoded(np.stack([scene(100).astype(np.uint8)] * 3, 2), ".png"))
    assert Repairer([*grey, colour], masks(2, (0, 3, 4))).repair(0).left == 1


def test_donors_of_another_size_are_resized(spoilt, tmp_path):
    paths, clean = spoilt
    large = tmp_path / "large.png"
    large.write_bytes(encoded(cv2.resize(scene(140, seed=9), (240, 160)).astype(np.uint8), ".png"))
    repaired = Repairer([paths[0], large], masks(2, (0, 3, 4))).repair(0)
    assert repaired.transplants[0].donor == large
    assert np.abs(repaired.image[SPOT].astype(float) - clean[SPOT]).mean() < 5


def test_overflow_is_clipped(tmp_path):
    bright, dark = scene(220), scene(100, seed=1)
    dark[SPOT] = 200
    paths = save(tmp_path, [bright, dark])
    assert Repairer(paths, masks(2, (0, 3, 4))).repair(0).image[SPOT].min() > 200


def test_of_many_images_some_are_donors(spoilt, monkeypatch):
    monkeypatch.setattr("anomalib_metarefine.curation.repair._MOST_DONORS", 2)
    paths, _ = spoilt
    first, second = (Repairer(paths, masks(5, (0, 3, 4)), seed) for seed in (0, 1))
    assert len(first._donors) == len(second._donors) == 2
    assert Repairer(paths, masks(5, (0, 3, 4)), 0)._donors.tolist() == first._donors.tolist()
    assert first._donors.tolist() != second._donors.tolist()


def test_bad_input(spoilt, tmp_path):
    paths, _ = spoilt
    with pytest.raises(ValueError, match=r"one mask .* for each of 5 images, found shape \(4, 8, 10\)"):
        Repairer(paths, masks(4))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"Images named \*.dat can't be written. Expected .png"):
        encoded(np.zeros((4, 4), np.uint8), ".dat")
    with pytest.raises(OSError, match="text.png can't be decoded. Expected a PNG"):
        Repairer([*paths, tmp_path / "text.png"], masks(6))


@pytest.mark.parametrize(("suffix", "loss"), [(".png", 0), (".bmp", 0), (".tif", 0), (".webp", 0), (".jpg", 1)])
def test_files_keep_what_is_in_them(tmp_path, suffix, loss):
    image = np.stack([cv2.GaussianBlur(scene(100, seed=seed), (0, 0), 2) for seed in range(3)], 2).astype(np.uint8)
    path = tmp_path / f"größe 部品{suffix}"
    path.write_bytes(encoded(image, suffix))
    assert np.abs(read_pixels(path).astype(int) - image).mean() <= loss


@given(arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7))))
def test_regions_are_apart_and_cover_what_is_unusual(unusual):
    found = list(regions(unusual))
    covered = np.zeros(unusual.shape, dtype=int)
    for region, _ in found:
        covered += region
    assert (covered == unusual).all()
    for region, ring in found:
        assert not (ring & unusual).any()
        assert ring.any() or region.all()


def test_files_that_lie_on_their_side_are_repaired_upright(tmp_path):
    exif, upright = Image.Exif(), scene(100, seed=1).astype(np.uint8)
    exif[274] = 6
    for suffix in (".jpg", ".png", ".tif", ".webp"):
        path = tmp_path / f"turned{suffix}"
        Image.fromarray(np.rot90(upright)).save(path, exif=exif, quality=100)
        assert np.abs(read_pixels(path).astype(int).reshape(*SIZE, -1) - upright[..., None]).mean() < 3
