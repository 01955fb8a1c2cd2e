import copy
import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
from anomalib.data.utils import read_image
from hypothesis import given
from hypothesis import strategies as st

from anomalib_metarefine.data.contamination import Contaminated, good_and_dirty
from tests.conftest import folder

SYNTHETIC = ("noise", "blur", "rotation")


def paths(dataset):
    return set(dataset.samples.image_path.astype(str))


def count(kind, images):
    return sum(Path(image).parent.name == kind for image in images)


@pytest.mark.parametrize("overlap", ["no-overlap", "overlap"])
def test_replaces_good_images_by_defective_ones(datamodule, overlap):
    dirty = Contaminated(datamodule, 0.25, overlap, seed=3)
    dirty.setup()
    assert len(dirty.train_data) == 24
    assert len(dirty.injected) == 6
    assert count("blob", dirty.injected) == 6
    assert count("blob", paths(dirty.train_data)) == 6
    assert dirty.is_injected.sum() == 6
    assert (dirty.train_data.samples.label_index == 0).all()
    assert len(paths(dirty.test_data) & set(dirty.injected)) == (0 if overlap == "no-overlap" else 6)
    assert count("good", paths(dirty.test_data)) == 8


def test_validation_sees_the_contaminated_test_set(datamodule):
    dirty = Contaminated(datamodule, 0.25, seed=3)
    dirty.setup()
    assert paths(dirty.val_data) == paths(dirty.test_data)


def test_seed_decides_and_the_wrapped_datamodule_is_left_alone(datamodule):
    datamodule.setup()
    before = paths(datamodule.train_data), paths(datamodule.test_data)
    first, again, other = (Contaminated(datamodule, 0.25, seed=seed) for seed in (1, 1, 2))
    for dirty in (first, again, other):
        dirty.setup()
    assert first.injected == again.injected != other.injected
    assert (paths(datamodule.train_data), paths(datamodule.test_data)) == before


def test_size_of_the_training_set(datamodule):
    dirty = Contaminated(datamodule, 0.5, train_images=10)
    dirty.setup()
    assert (len(dirty.train_data), len(dirty.injected)) == (10, 5)


@given(st.integers(1, 5000), st.floats(0, 0.95), st.sampled_from(["replace", "add"]))
def test_contamination_is_the_share_in_the_finished_training_set(images, contamination, protocol):
    good, dirty = good_and_dirty(images, contamination, protocol)
    assert (good if protocol == "add" else good + dirty) == images
    assert min(good, dirty) >= 0
    # The nearest that whole images allow: rounding is off by half an image, and an added one dilutes itself.
    slack = 0.5 if protocol == "replace" else 0.5 * (1 - contamination)
    assert abs(dirty / (good + dirty) - contamination) <= slack / (good + dirty) + 1e-12


@given(st.integers(1, 500), st.floats(0, 0.9), st.floats(0, 0.9), st.sampled_from(["replace", "add"]))
def test_more_contamination_means_no_fewer_dirty_images(images, less, more, protocol):
    less, more = sorted((less, more))
    assert good_and_dirty(images, less, protocol)[1] <= good_and_dirty(images, more, protocol)[1]


def test_seeds_choose_what_they_always_chose(datamodule):
    """Results that were published with a seed stay reproducible."""
    dirty = Contaminated(datamodule, 0.25, seed=3)
    dirty.setup()
    assert [Path(image).stem for image in dirty.injected] == ["001", "002", "004", "005", "006", "007"]
    kept = dirty.train_data.samples[~dirty.is_injected].image_path
    assert sorted(set(range(24)) - {int(Path(image).stem) for image in kept}) == [1, 2, 6, 7, 9, 18]


@pytest.mark.parametrize("train_images", [None, 12])
def test_added_images_come_on_top(datamodule, train_images):
    dirty = Contaminated(datamodule, 0.2, seed=3, train_images=train_images, protocol="add")
    dirty.setup()
    good = train_images or 24
    assert count("good", paths(dirty.train_data)) == good
    assert count("blob", paths(dirty.train_data)) == len(dirty.injected) == good / 4
    assert len(dirty.test_data) == 16 - good / 4


@pytest.mark.parametrize("defects", SYNTHETIC)
@pytest.mark.parametrize("protocol", ["replace", "add"])
@pytest.mark.parametrize("overlap", ["no-overlap", "overlap"])
def test_synthetic_defects_are_copies_of_good_training_images(parts, defects, protocol, overlap):
    datamodule = folder(parts)
    files = sorted(parts.rglob("*"))
    dirty = Contaminated(datamodule, 0.25, overlap, 3, protocol=protocol, defects=defects)
    dirty.setup()
    datamodule.setup()
    originals = {Path(path).stem: path for path in paths(datamodule.train_data)}
    sources = {originals[Path(path).stem.split("_")[1]] for path in dirty.injected}
    assert (len(dirty.train_data), len(dirty.injected)) == ((24, 6) if protocol == "replace" else (32, 8))
    assert len(sources) == len(dirty.injected) == dirty.is_injected.sum()
    kept = paths(dirty.train_data) - set(dirty.injected)
    assert kept == (paths(datamodule.train_data) - sources if protocol == "replace" else paths(datamodule.train_data))
    assert (dirty.train_data.samples.label_index == 0).all()
    assert paths(dirty.test_data) == paths(datamodule.test_data)
    assert sorted(parts.rglob("*")) == files  # nothing is written beside the user's images
    for path in dirty.injected:
        original = read_image(originals[Path(path).stem.split("_")[1]])
        assert np.abs(read_image(path) - original).mean() > 0.01
    index = int(np.flatnonzero(dirty.is_injected)[0])
    assert dirty.train_data[index].image.shape == (3, 96, 96)


def test_a_seed_keeps_the_same_good_images_whatever_the_defects(datamodule):
    kept = []
    for defects in ("real", *SYNTHETIC):
        dirty = Contaminated(datamodule, 0.25, seed=5, defects=defects)
        dirty.setup()
        kept.append(paths(dirty.train_data) - set(dirty.injected))
    assert all(one == kept[0] for one in kept)


@pytest.mark.parametrize("protocol", ["replace", "add"])
@pytest.mark.parametrize("defects", ["real", "noise"])
def test_more_contamination_keeps_the_dirty_images_of_less(datamodule, protocol, defects):
    less, more = (Contaminated(datamodule, share, seed=5, protocol=protocol, defects=defects) for share in (0.1, 0.2))
    less.setup()
    more.setup()
    names = [{Path(path).name for path in dirty.injected} for dirty in (less, more)]
    assert names[0] < names[1]


def test_adding_more_than_there_are_good_images_takes_copies_of_others(datamodule):
    dirty = Contaminated(datamodule, 0.6, train_images=10, protocol="add", defects="blur")
    dirty.setup()
    assert (len(dirty.train_data), len(dirty.injected)) == (25, 15)


def test_synthetic_images_live_as_long_as_the_datamodule_or_a_copy_of_it(datamodule):
    dirty = Contaminated(datamodule, 0.25, defects="noise")
    dirty.setup()
    first = dirty.injected
    dirty.setup()
    assert dirty.injected == first
    second, third = copy.deepcopy(dirty), pickle.loads(pickle.dumps(dirty))
    assert second.injected == third.injected == first
    del dirty, third
    gc.collect()
    assert all(Path(path).is_file() for path in first)
    assert second.train_data[0].image.shape == (3, 96, 96)
    del second
    gc.collect()
    assert not Path(first[0]).parent.exists()


def test_a_pickled_datamodule_sets_itself_up_elsewhere_and_cleans_up(datamodule):
    dirty = Contaminated(datamodule, 0.25, defects="noise")
    dirty.setup()
    before = {Path(path).name: Path(path).read_bytes() for path in dirty.injected}
    elsewhere = pickle.dumps(dirty)
    del dirty
    gc.collect()
    again = pickle.loads(elsewhere)
    again.setup()
    assert {Path(path).name: Path(path).read_bytes() for path in again.injected} == before
    folder_of_its_own = Path(again.injected[0]).parent
    del again
    gc.collect()
    assert not folder_of_its_own.exists()


def test_says_what_is_missing(datamodule):
    with pytest.raises(ValueError, match="needs 10 defective.*has 8"):
        Contaminated(datamodule, 0.4).setup()
    with pytest.raises(ValueError, match=r"\[0, 1\), found 40"):
        Contaminated(datamodule, 40)
    with pytest.raises(ValueError, match="'no-overlap' or 'overlap'"):
        Contaminated(datamodule, 0.1, "both")
    with pytest.raises(ValueError, match="needs 100 good images"):
        Contaminated(datamodule, 0.0, train_images=100).setup()
    with pytest.raises(ValueError, match="protocol must be 'replace' or 'add', found 'both'"):
        Contaminated(datamodule, 0.1, protocol="both")
    with pytest.raises(ValueError, match="defects must be 'real', 'noise', 'blur' or 'rotation', found 'dust'"):
        Contaminated(datamodule, 0.1, defects="dust")
    with pytest.raises(ValueError, match="training set of 34 images .* needs 10 defective.*has 8"):
        Contaminated(datamodule, 0.3, protocol="add").setup()
    with pytest.raises(ValueError, match="needs 30 good images; .* has 24"):
        Contaminated(datamodule, 0.2, train_images=30, defects="blur").setup()
    with pytest.raises(ValueError, match="36 defective ones needs 36 good images; .* has 24"):
        Contaminated(datamodule, 0.6, protocol="add", defects="blur").setup()
