"""Two tables of images as a datamodule of anomalib, each image read and resized once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.dataclasses.torch import ImageItem
from anomalib.data.utils import LabelName, read_image, read_mask
from torchvision.transforms.v2 import Resize
from torchvision.tv_tensors import Mask

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from anomalib_metarefine.benchmark.memo import Memo

_EVAL_BATCH = 1  # a score must not depend on what else is in its batch, and that of anomalib's CFlow does


class MemoisedImages(AnomalibDataset):
    """Images, labels and masks as an anomalib dataset gives them, decoded and resized once.

    Args:
        samples (pd.DataFrame): anomalib's table. The label is never kept: an image may be normal in one training set,
            where it is an unlabelled defect, and abnormal in another's test set.
        image_size (tuple[int, int]): Height and width, resized to as anomalib's datamodules do.
        memo (Memo): Where resized images and masks are kept.

    Attributes:
        has_masks (bool): Whether every abnormal image has a mask; then, and only then, all images get one.
    """

    def __init__(self, samples: pd.DataFrame, image_size: tuple[int, int], memo: Memo) -> None:
        super().__init__()
        masks = samples["mask_path"].fillna("").astype(str) if "mask_path" in samples else ""
        self.samples = samples.assign(mask_path=masks)
        self.resize = Resize(tuple(image_size), antialias=True)
        self.memo = memo
        abnormal = self.samples[self.samples.label_index == LabelName.ABNORMAL]
        self.has_masks = len(abnormal) > 0 and bool(abnormal.mask_path.ne("").all())
        self.samples.attrs["task"] = "segmentation" if self.has_masks else "classification"

    def __getitem__(self, index: int) -> ImageItem:
        """One image ``[3 x H x W]`` in [0, 1], its label, path, and mask ``[H x W]``."""
        row = self.samples.iloc[index]
        mask = None
        if self.has_masks and row.label_index == LabelName.NORMAL:
            mask = Mask(torch.zeros(self.resize.size, dtype=torch.uint8))
        elif self.has_masks:
            mask = Mask(self._read(str(row.mask_path), read_mask))
        return ImageItem(
            image=self._read(str(row.image_path), read_image),
            gt_mask=mask,
            gt_label=torch.tensor(int(row.label_index)),
            image_path=str(row.image_path),
        )

    def _read(self, path: str, read: Callable[..., torch.Tensor]) -> torch.Tensor:
        key = ("image", read.__name__, path, tuple(self.resize.size))
        return self.memo.fetch(key, ["pixels"], lambda: [self.resize(read(path, as_tensor=True))])[0]


class MemoisedData(AnomalibDataModule):
    """Training and test set; the training images stand in for a validation set where a model can't do without."""

    def __init__(
        self, train: pd.DataFrame, test: pd.DataFrame, batch_size: int, image_size: tuple[int, int], memo: Memo
    ) -> None:
        super().__init__(train_batch_size=batch_size, eval_batch_size=_EVAL_BATCH, num_workers=0)
        self._tables = {"train": train, "test": test}
        self._reading = {"image_size": image_size, "memo": memo}

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = MemoisedImages(self._tables["train"], **self._reading)
        self.test_data = MemoisedImages(self._tables["test"], **self._reading)
        self.val_data = self.train_data

    def _create_test_split(self) -> None:
        """Leave the test set as it is; anomalib would take normal images out of it, or more from the training set."""
