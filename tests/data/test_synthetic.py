import copy
import gc
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomalib_metarefine.data.elpv import packaged_root
from anomalib_metarefine.data.synthetic import DEFECTS, TemporaryFolder, add_noise, blur, rotate, write_defective

CELLS = [str(packaged_root() / "images" / f"cell{number:04d}.png") for number in (5, 88, 95)]


def grey(height, width, level=128):
    return np.full((height, width, 3), level, dtype=np.uint8)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("worsen", DEFECTS.values())
@settings(deadline=None, max_examples=20)
@given(st.integers(40, 80), st.integers(40, 80), st.integers(0, 2**32 - 1))
def test_shape_type_and_seed(worsen, height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = image.copy()
    worse = worsen(image, np.random.default_rng(seed))
    assert (worse.shape, worse.dtype) == (image.shape, image.dtype)
    assert (image == before).all()
    assert (worse == worsen(image, np.random.default_rng(seed))).all()
    assert (worse != image).any()


def test_noise_has_its_strength_and_keeps_grey_images_grey():
    worse = add_noise(grey(200, 200), np.random.default_rng(0)).astype(float)
    assert worse.std() == pytest.approx(46, rel=0.02)
    assert worse.mean() == pytest.approx(128, abs=0.5)
    assert np.ptp(worse, axis=2).max() == 0


@pytest.mark.parametrize("side", [112, 448])
def test_blur_goes_by_the_shorter_side(side):
    image = grey(side, 2 * side, 0)
    image[:, side:] = 255  # the slope of a blurred edge is the Gaussian itself
    slope = np.diff(blur(image, None)[side // 2, :, 0].astype(float))
    columns = np.arange(len(slope)) - (slope * np.arange(len(slope))).sum() / slope.sum()
    assert np.sqrt((slope * columns**2).sum() / slope.sum()) == pytest.approx(3 / 224 * side, rel=0.06)


@pytest.mark.parametrize("seed", range(8))
def test_rotation_turns_by_15_to_45_degrees_and_shows_no_black_corners(seed):
    image = grey(201, 201, 60)
    image[98:103, 40:161] = 255
    worse = rotate(image, np.random.default_rng(seed))
    (_, _), (width, height), angle = cv2.minAreaRect(np.argwhere(worse[..., 0] > 128)[:, ::-1].astype(np.float32))
    from_horizontal = (angle if width > height else angle + 90) % 180
    assert 14.5 < min(from_horizontal, 180 - from_horizontal) < 45.5
    assert worse.min() == 60


def test_rotation_goes_to_either_side():
    image = grey(50, 50)
    image[:, :25] = 0
    ups = [rotate(image, np.random.default_rng(seed))[:10, 25].mean() < 64 for seed in range(12)]
    assert 0 < sum(ups) < 12


def test_real_cells_look_worse(tmp_path):
    """What a person sees: grain, softness, or lines that run askew."""

    def detail(image):
        return cv2.Laplacian(image[..., 0].astype(float), cv2.CV_64F).std()

    def across(image):
        """How much more rows differ from each other than columns do: a cell's bars are horizontal."""
        level = image[..., 0].astype(float)[30:-30, 30:-30]
        return level.mean(axis=1).std() / level.mean(axis=0).std()

    for defect in DEFECTS:
        for original, copied in zip(CELLS, write_defective(CELLS, range(3), defect, 0, tmp_path), strict=True):
            before, after = pixels(original), pixels(copied)
            assert after.shape == before.shape
            assert np.ptp(after, axis=2).max() == 0
            if defect == "noise":
                assert detail(after) > 5 * detail(before)
            elif defect == "blur":
                assert detail(after) < detail(before) / 2
            else:
                assert across(after) < across(before) / 1.5


def test_a_copy_depends_on_nothing_but_its_image_number_and_seed(tmp_path):
    def written(images, numbers, seed, folder):
        return [Path(path).read_bytes() for path in write_defective(images, numbers, "noise", seed, tmp_path / folder)]

    three = written(CELLS, [3, 5, 7], 1, "three")
    assert written(CELLS[1:2], [5], 1, "one") == three[1:2]
    assert written(CELLS[1:2], [6], 1, "number") != three[1:2]
    assert written(CELLS[1:2], [5], 2, "seed") != three[1:2]


def test_a_process_of_its_own_writes_the_same_bytes(tmp_path):
    def digest(paths):
        return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()

    code = (
        "import sys, pathlib\n"
        "from anomalib_metarefine.data.synthetic import write_defective\n"
        "for defect in ('noise', 'blur', 'rotation'):\n"
        f"    print(*write_defective({CELLS[:1]}, [4], defect, 9, pathlib.Path(sys.argv[1])))\n"
    )
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "there")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    ).stdout.split()
    assert digest(there) == digest(write_defective(CELLS[:1], [4], defect, 9, tmp_path)[0] for defect in DEFECTS)


def test_images_of_one_name_are_kept_apart_and_no_copy_is_written_twice(tmp_path):
    for folder, level in (("a", 50), ("b", 200)):
        (tmp_path / folder).mkdir()
        Image.fromarray(grey(9, 9, level)).save(tmp_path / folder / "000.png")
    images = [str(tmp_path / folder / "000.png") for folder in "ab"]
    first, second = write_defective(images, [0, 0], "blur", 0, tmp_path / "copies")
    assert (pixels(first).mean(), pixels(second).mean()) == (50, 200)
    Path(first).write_bytes(b"being read")
    assert write_defective(images, [0, 0], "blur", 0, tmp_path / "copies") == [first, second]
    assert Path(first).read_bytes() == b"being read"


def test_a_temporary_folder_goes_with_its_last_owner():
    folder = TemporaryFolder()
    path = folder.path
    second, third = copy.deepcopy(folder), pickle.loads(pickle.dumps(folder))
    assert second.path == path
    assert third.path != path
    assert third.path.is_dir()
    del folder, third
    gc.collect()
    assert path.is_dir()
    del second
    gc.collect()
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_worker_leaves_the_folder_alone():
    folder = TemporaryFolder()
    child = os.fork()
    if child == 0:
        del folder
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.is_dir()
