import copy

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anomalib_metarefine.benchmark.images import MemoisedData, MemoisedImages
from anomalib_metarefine.benchmark.memo import Memo
from tests.conftest import folder

SIZE = (64, 96)


@pytest.fixture
def masked(parts):
    """The samples of `parts`, defects with masks."""
    (parts / "masks").mkdir()
    for index in range(8):
        mask = np.zeros((96, 96), dtype=np.uint8)
        mask[10 * index : 10 * index + 20, 30:60] = 255
        Image.fromarray(mask).save(parts / "masks" / f"{index:03d}.png")
    datamodule = folder(parts, mask_dir="masks", val_split_mode="none")
    datamodule.setup()
    return datamodule


def test_items_are_those_of_anomalib(masked):
    from torchvision.transforms.v2 import Resize

    theirs = masked.test_data
    theirs.augmentations = Resize(SIZE, antialias=True)
    memo = Memo()
    ours = MemoisedImages(theirs.samples, SIZE, memo)
    assert len(ours) == len(theirs) == 16
    for _ in range(2):  # read, and kept
        for expected, found in zip(theirs, ours, strict=True):
            assert found.image_path == expected.image_path
            torch.testing.assert_close(found.image, expected.image)
            assert torch.equal(found.gt_label, expected.gt_label)
            assert torch.equal(found.gt_mask, expected.gt_mask)
    assert len(memo) == 16 + 8
    assert sum(bool(item.gt_mask.any()) for item in ours) == 8


def test_labels_are_not_kept(parts):
    memo = Memo()
    path = str(next((parts / "test/blob").iterdir()))
    for label in (0, 1):
        samples = pd.DataFrame({"image_path": [path], "label_index": [label], "split": ["test"]})
        item = MemoisedImages(samples, SIZE, memo)[0]
        assert item.gt_label == label
        assert item.gt_mask is None
    assert len(memo) == 1


def test_masks_all_or_none(masked):
    samples = masked.test_data.samples.copy()
    samples.loc[samples.label_index == 1, "mask_path"] = [""] + [str(masked.root / "masks/001.png")] * 7
    images = MemoisedImages(samples, SIZE, Memo())
    assert not images.has_masks
    assert all(item.gt_mask is None for item in images)


def test_tables_stay_as_they_are(masked):
    train, test = masked.train_data.samples, masked.test_data.samples
    data = MemoisedData(train, test[test.label_index == 1], 5, SIZE, Memo())
    data.setup()
    assert (len(data.train_data), len(data.test_data)) == (24, 8)  # anomalib would move half of the training images
    data = MemoisedData(train, test, 5, SIZE, Memo())
    data.setup()
    assert sorted(data.test_data.samples.label_index) == [0] * 8 + [1] * 8
    assert data.train_dataloader().batch_size == data.train_batch_size == 5
    batch = next(iter(data.test_dataloader()))  # one image: some models compare those of a batch
    assert (tuple(batch.image.shape), tuple(batch.gt_mask.shape)) == ((1, 3, *SIZE), (1, *SIZE))


def test_a_copy_reads_nothing_again(parts):
    memo = Memo()
    datamodule = folder(parts)
    datamodule.setup()
    images = MemoisedImages(datamodule.train_data.samples, SIZE, memo)
    kept = images.subsample([3, 5])[0]
    assert len(memo) == 1
    assert torch.equal(copy.deepcopy(images)[3].image, kept.image)
    assert len(memo) == 1
