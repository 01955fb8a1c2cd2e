"""Controlled contamination: real defective images put into the training set of any anomalib datamodule."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import pandas as pd
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split, ValSplitMode


class Contaminated(AnomalibDataModule):
    """A datamodule whose training set is dirty to a known degree.

    A share of the training images is replaced by defective images of the test set. The wrapped datamodule is never
    changed. Injected images carry the label and split of training images, as unlabelled defects do; `injected` lists
    them.

    Args:
        datamodule (AnomalibDataModule): Where the images come from. Defective images are drawn from its test set.
        contamination (float): Share of dirty images in the training set, in [0, 1).
        protocol (Literal["no-overlap", "overlap"]): Whether injected images leave the test set or stay in it.
        seed (int): Which images are replaced, and by which.
        train_images (int | None): Size of the training set; ``None`` keeps that of ``datamodule``.

    Attributes:
        injected (list[str]): Paths of the defective images in the training set.

    Raises:
        ValueError: If there are too few defective or good images for what is asked.

    Example:
        >>> from anomalib_metarefine import ELPV
        >>> datamodule = Contaminated(ELPV(cell_type="mono"), contamination=0.2, seed=0)
        >>> datamodule.setup()
        >>> len(datamodule.train_data), len(datamodule.injected)
        (300, 60)
    """

    def __init__(
        self,
        datamodule: AnomalibDataModule,
        contamination: float = 0.2,
        protocol: Literal["no-overlap", "overlap"] = "no-overlap",
        seed: int = 0,
        train_images: int | None = None,
    ) -> None:
        if not 0 <= contamination < 1:
            msg = f"contamination must be a share in [0, 1), found {contamination}."
            raise ValueError(msg)
        if protocol not in ("no-overlap", "overlap"):
            msg = f"protocol must be 'no-overlap' or 'overlap', found {protocol!r}."
            raise ValueError(msg)
        super().__init__(
            train_batch_size=datamodule.train_batch_size,
            eval_batch_size=datamodule.eval_batch_size,
            num_workers=datamodule.num_workers,
            train_augmentations=datamodule.train_augmentations,
            val_augmentations=datamodule.val_augmentations,
            test_augmentations=datamodule.test_augmentations,
            val_split_mode=datamodule.val_split_mode,
            val_split_ratio=datamodule.val_split_ratio,
            test_split_mode=datamodule.test_split_mode,
            test_split_ratio=datamodule.test_split_ratio,
            seed=seed,
        )
        self.datamodule = datamodule
        self.contamination = contamination
        self.protocol = protocol
        self.train_images = train_images
        self.category = datamodule.category
        self.injected: list[str] = []

    @property
    def name(self) -> str:
        """Name of the wrapped datamodule: results of one data set lie side by side."""
        return self.datamodule.name

    def prepare_data(self) -> None:
        """Download what the wrapped datamodule would download."""
        self.datamodule.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        # A copy without its validation split: that is carved out of the contaminated sets afterwards, so that
        # validation images taken from the training set are as dirty as they would be in life.
        source = copy.deepcopy(self.datamodule)
        source.val_split_mode = ValSplitMode.NONE
        source.setup()
        train, test = source.train_data.samples, source.test_data.samples
        generator = np.random.default_rng(self.seed)
        defective = generator.permutation(np.flatnonzero(test.label_index == LabelName.ABNORMAL))
        total = self.train_images or len(train)
        dirty = round(self.contamination * total)
        if dirty > len(defective) or (self.protocol == "no-overlap" and dirty == len(defective)):
            msg = (
                f"A training set of {total} images with contamination {self.contamination:g} needs {dirty} defective "
                f"images, and the test set must keep some. {self.name} has {len(defective)}. Lower `contamination` or "
                "`train_images`."
            )
            raise ValueError(msg)
        if total - dirty > len(train):
            msg = (
                f"train_images={total} with {dirty} defective ones needs {total - dirty} good images; {self.name} has "
            )
            raise ValueError(msg + f"{len(train)}.")
        kept = np.sort(generator.permutation(len(train))[: total - dirty])
        chosen = np.sort(defective[:dirty])
        injected = test.iloc[chosen].assign(split=Split.TRAIN.value, label_index=int(LabelName.NORMAL))
        self.injected = injected.image_path.astype(str).tolist()
        self.train_data, self.test_data = source.train_data, source.test_data
        self.train_data.samples = _concatenate(train.iloc[kept], injected)
        if self.protocol == "no-overlap":
            self.test_data.samples = _concatenate(test.drop(index=test.index[chosen]))

    @property
    def is_injected(self) -> pd.Series:
        """For every row of ``train_data.samples``, whether it is an injected defective image."""
        return self.train_data.samples.image_path.astype(str).isin(self.injected)


def _concatenate(*parts: pd.DataFrame) -> pd.DataFrame:
    samples = pd.concat(parts, ignore_index=True)
    samples.attrs = parts[0].attrs  # the task, which pandas drops when frames disagree
    return samples
