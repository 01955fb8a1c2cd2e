"""Controlled contamination: defective images put into the training set of any anomalib datamodule."""

from __future__ import annotations

import copy
from typing import Literal, get_args

import numpy as np
import pandas as pd
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split, ValSplitMode

Overlap = Literal["no-overlap", "overlap"]
Protocol = Literal["replace", "add"]


class Contaminated(AnomalibDataModule):
    """A datamodule whose training set is dirty to a known degree.

    Defective images of the test set take the place of good training images, or come on top of them. The wrapped
    datamodule is never changed. Injected images carry the label and split of training images, as unlabelled defects do;
    `injected` lists them. With the same seed and more contamination, the dirty images of less are there again.

    Args:
        datamodule (AnomalibDataModule): Where the images come from.
        contamination (float): Share of dirty images in the finished training set, in [0, 1).
        overlap (Overlap): Whether injected images leave the test set or stay in it too.
        seed (int): Which good images are kept, and which defective ones come in.
        train_images (int | None): Size of the training set; with ``protocol="add"``, number of its good images.
            ``None`` takes as many as ``datamodule`` has in its training set.
        protocol (Protocol): ``"replace"``: dirty images take the place of good ones, the size stays. ``"add"``: good
            images stay and dirty ones come on top of them.

    Attributes:
        injected (list[str]): Paths of the defective images in the training set.

    Raises:
        ValueError: If there are too few defective or good images for what is asked, or the training set of
            ``datamodule`` is dirty already.

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
        overlap: Overlap = "no-overlap",
        seed: int = 0,
        train_images: int | None = None,
        protocol: Protocol = "replace",
    ) -> None:
        if not 0 <= contamination < 1:
            msg = f"contamination must be a share in [0, 1), found {contamination}."
            raise ValueError(msg)
        for name, value, choices in (
            ("overlap", overlap, get_args(Overlap)),
            ("protocol", protocol, get_args(Protocol)),
        ):
            if value not in choices:
                msg = f"{name} must be {' or '.join(map(repr, choices))}, found {value!r}."
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
        self.overlap = overlap
        self.train_images = train_images
        self.protocol = protocol
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
        self._check_clean(source)
        train, test = source.train_data.samples, source.test_data.samples
        generator = np.random.default_rng(self.seed)
        defective = generator.permutation(np.flatnonzero(test.label_index == LabelName.ABNORMAL))
        order = generator.permutation(len(train))
        good, dirty = good_and_dirty(self.train_images or len(train), self.contamination, self.protocol)
        self._check_enough(good, dirty, len(train), len(defective))
        chosen = np.sort(defective[:dirty])
        injected = test.iloc[chosen].assign(split=Split.TRAIN.value, label_index=int(LabelName.NORMAL))
        self.injected = injected.image_path.astype(str).tolist()
        self.train_data, self.test_data = source.train_data, source.test_data
        self.train_data.samples = _concatenate(train.iloc[np.sort(order[:good])], injected)
        if self.overlap == "no-overlap":
            self.test_data.samples = _concatenate(test.drop(index=test.index[chosen]))

    def _check_clean(self, source: AnomalibDataModule) -> None:
        known = len(getattr(source, "unlabelled_defects", []))
        if known:
            msg = (
                f"The training set of {self.name} holds {known} defective images already, so a contamination of "
                f"{self.contamination:g} would not be the share of dirty ones. Wrap a clean one (for KolektorSDD2, "
                "train_defects='drop' or 'test')."
            )
            raise ValueError(msg)

    def _check_enough(self, good: int, dirty: int, available_good: int, available: int) -> None:
        if dirty > available or (self.overlap == "no-overlap" and dirty == available):
            msg = (
                f"A training set of {good + dirty} images with contamination {self.contamination:g} needs {dirty} "
                f"defective images, and the test set must keep some. {self.name} has {available}. Lower "
                "`contamination` or `train_images`."
            )
            raise ValueError(msg)

        if good > available_good:
            msg = (
                f"train_images={self.train_images} with {dirty} defective ones needs {good} good "
                f"images; {self.name} has {available_good}. Lower `train_images`."
            )
            raise ValueError(msg)

    @property
    def is_injected(self) -> pd.Series:
        """For every row of ``train_data.samples``, whether it is an injected defective image."""
        return self.train_data.samples.image_path.astype(str).isin(self.injected)


def good_and_dirty(images: int, contamination: float, protocol: Protocol) -> tuple[int, int]:
    """How many good and dirty images a training set has, so that the dirty ones' share is nearest to ``contamination``.

    Args:
        images (int): All images of the training set; with ``protocol="add"``, its good ones.
        contamination (float): Share of dirty images among all, in [0, 1).
        protocol (Protocol): As in `Contaminated`.

    Returns:
        tuple[int, int]: Good and dirty images.

    Example:
        >>> good_and_dirty(300, 0.25, "replace"), good_and_dirty(300, 0.25, "add")
        ((225, 75), (300, 100))
    """
    if protocol == "add":
        return images, round(contamination / (1 - contamination) * images)
    dirty = round(contamination * images)
    return images - dirty, dirty


def _concatenate(*parts: pd.DataFrame) -> pd.DataFrame:
    samples = pd.concat(parts, ignore_index=True)
    samples.attrs = parts[0].attrs  # the task, which pandas drops when frames disagree
    return samples
