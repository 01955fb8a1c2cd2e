from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_metarefine.data.contamination import Contaminated, good_and_dirty


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


@pytest.mark.parametrize("protocol", ["replace", "add"])
def test_more_contamination_keeps_the_dirty_images_of_less(datamodule, protocol):
    less, more = (Contaminated(datamodule, share, seed=5, protocol=protocol) for share in (0.1, 0.2))
    less.setup()
    more.setup()
    names = [{Path(path).name for path in dirty.injected} for dirty in (less, more)]
    assert names[0] < names[1]


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
    with pytest.raises(ValueError, match="training set of 34 images .* needs 10 defective.*has 8"):
        Contaminated(datamodule, 0.3, protocol="add").setup()
