from pathlib import Path

import pytest

from anomalib_metarefine.data.contamination import Contaminated


def paths(dataset):
    return set(dataset.samples.image_path.astype(str))


def count(kind, images):
    return sum(Path(image).parent.name == kind for image in images)


@pytest.mark.parametrize("protocol", ["no-overlap", "overlap"])
def test_replaces_good_images_by_defective_ones(datamodule, protocol):
    dirty = Contaminated(datamodule, 0.25, protocol, seed=3)
    dirty.setup()
    assert len(dirty.train_data) == 24
    assert len(dirty.injected) == 6
    assert count("blob", dirty.injected) == 6
    assert count("blob", paths(dirty.train_data)) == 6
    assert dirty.is_injected.sum() == 6
    assert (dirty.train_data.samples.label_index == 0).all()
    assert len(paths(dirty.test_data) & set(dirty.injected)) == (0 if protocol == "no-overlap" else 6)
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


def test_says_what_is_missing(datamodule):
    with pytest.raises(ValueError, match="needs 10 defective.*has 8"):
        Contaminated(datamodule, 0.4).setup()
    with pytest.raises(ValueError, match=r"\[0, 1\), found 40"):
        Contaminated(datamodule, 40)
    with pytest.raises(ValueError, match="'no-overlap' or 'overlap'"):
        Contaminated(datamodule, 0.1, "both")
    with pytest.raises(ValueError, match="needs 100 good images"):
        Contaminated(datamodule, 0.0, train_images=100).setup()
