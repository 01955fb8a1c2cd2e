import pytest
from anomalib.data.utils import LabelName

from anomalib_metarefine.data.elpv import ELPV


@pytest.mark.parametrize(
    ("cell_type", "good", "defective"), [("mono", 588, 313), ("poly", 920, 402), ("both", 1508, 715)]
)
def test_splits_hold_every_certain_cell_once(cell_type, good, defective):
    datamodule = ELPV(cell_type, train_images=300)
    datamodule.setup()
    train, test = datamodule.train_data.samples, datamodule.test_data.samples
    assert len(train) == 300
    assert (train.label_index == LabelName.NORMAL).all()
    assert (test.label_index == LabelName.NORMAL).sum() == good - 300
    assert (test.label_index == LabelName.ABNORMAL).sum() == defective
    assert not set(train.image_path) & set(test.image_path)
    assert set(datamodule.ambiguous.probability.round(2)) == {0.33, 0.67}


def test_seed_chooses_the_training_cells():
    first, again, other = (ELPV(seed=seed) for seed in (1, 1, 2))
    for datamodule in (first, again, other):
        datamodule.setup()
    assert first.train_data.samples.image_path.equals(again.train_data.samples.image_path)
    assert not first.train_data.samples.image_path.equals(other.train_data.samples.image_path)


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="'mono', 'poly' or 'both', found 'thin'"):
        ELPV("thin")
    with pytest.raises(ValueError, match="588 good mono cells"):
        ELPV(train_images=588).setup()
    with pytest.raises(FileNotFoundError, match="No labels.csv"):
        ELPV(root=tmp_path).setup()


def test_batches_have_labels():
    datamodule = ELPV(train_batch_size=4)
    datamodule.setup()
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.image.shape[1:] == (3, 300, 300)
    assert batch.gt_label is not None
