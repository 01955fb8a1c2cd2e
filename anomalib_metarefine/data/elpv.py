"""ELPV: electroluminescence images of solar cells, with graded labels, from the package ``elpv-dataset``.

References:
    Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
    Imagery", EU PVSEC 2018. Images: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

CellType = Literal["mono", "poly", "both"]


class ELPVDataset(AnomalibDataset):
    """Images of one split.

    Args:
        samples (pd.DataFrame): Rows of `make_elpv_samples`.
        augmentations (Transform | None): Applied to every image.
    """

    def __init__(self, samples: pd.DataFrame, augmentations: Transform | None = None) -> None:
        super().__init__(augmentations=augmentations)
        self.samples = samples


class ELPV(AnomalibDataModule):
    """2,624 solar cells of 300 x 300 pixels, each with a probability of being defective.

    Good is probability 0, defective probability 1. Cells where the experts were unsure (1/3 and 2/3) are in neither
    split; `ambiguous` lists them. Some of the good cells are for training, all other cells are for testing.

    Args:
        cell_type (CellType): ``"mono"`` (monocrystalline), ``"poly"`` (polycrystalline) or ``"both"``.
        train_images (int): Good cells in the training set.
        root (str | Path | None): Folder with ``labels.csv`` and ``images/``; ``None`` takes the installed package's.
        train_batch_size (int): Batch size of the training dataloader.
        eval_batch_size (int): Batch size of the other dataloaders.
        num_workers (int): Workers of each dataloader.
        val_split_mode (ValSplitMode | str): Where validation images come from.
        **settings (Any): See `AnomalibDataModule`; its ``seed`` draws the good cells for training (``None`` means 0).

    Raises:
        ModuleNotFoundError: If ``root`` is not given and the package is not installed.
        ValueError: If ``cell_type`` is unknown or there are too few good cells.

    Example:
        >>> datamodule = ELPV(cell_type="mono", train_images=300)
        >>> datamodule.setup()
        >>> len(datamodule.train_data), len(datamodule.ambiguous)
        (300, 173)
    """

    def __init__(
        self,
        cell_type: CellType = "mono",
        train_images: int = 300,
        root: str | Path | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            val_split_mode=val_split_mode,
            test_split_mode=TestSplitMode.FROM_DIR,
            **settings,
        )
        if cell_type not in ("mono", "poly", "both"):
            msg = f"cell_type must be 'mono', 'poly' or 'both', found {cell_type!r}."
            raise ValueError(msg)
        self.cell_type = cell_type
        self.category = cell_type
        self.train_images = train_images
        self.root = Path(root) if root is not None else None
        self.ambiguous: pd.DataFrame

    def _setup(self, _stage: str | None = None) -> None:
        samples = make_elpv_samples(self.root or packaged_root(), self.cell_type)
        self.ambiguous = samples[samples.label_index == LabelName.UNKNOWN].reset_index(drop=True)
        samples = samples[samples.label_index != LabelName.UNKNOWN]
        good = samples.index[samples.label_index == LabelName.NORMAL].to_numpy()
        if not 0 < self.train_images < len(good):
            msg = (
                f"train_images must be between 1 and {len(good) - 1}: there are {len(good)} good {self.cell_type} "
                f"cells, and one at least must be left to test on. Found {self.train_images}."
            )
            raise ValueError(msg)
        train = np.random.default_rng(self.seed or 0).permutation(good)[: self.train_images]
        is_train = samples.index.isin(train)
        self.train_data = ELPVDataset(_with_split(samples[is_train], Split.TRAIN))
        self.test_data = ELPVDataset(_with_split(samples[~is_train], Split.TEST))


def packaged_root() -> Path:
    """Folder of the images in the installed package ``elpv-dataset``."""
    try:
        import elpv_dataset
    except ModuleNotFoundError as error:
        msg = "The ELPV images are not installed. Run `pip install 'anomalib-metarefine[demo]'`, or pass root=."
        raise ModuleNotFoundError(msg) from error
    return Path(elpv_dataset.__file__).parent / "data"


def make_elpv_samples(root: str | Path, cell_type: CellType = "both") -> pd.DataFrame:
    """The samples table of anomalib, read from ``labels.csv``.

    Args:
        root (str | Path): Folder with ``labels.csv`` and ``images/``.
        cell_type (CellType): Which cells.

    Returns:
        pd.DataFrame: ``image_path``, ``mask_path`` (empty), ``label_index`` (-1 for ambiguous cells), ``probability``,
            ``cell_type``.

    Raises:
        FileNotFoundError: If there is no ``labels.csv``.
    """
    labels = Path(root) / "labels.csv"
    if not labels.is_file():
        msg = f"No labels.csv in {root}. Expected the folder of the ELPV data set, with labels.csv and images/."
        raise FileNotFoundError(msg)
    table = pd.read_csv(labels, sep=r"\s+", names=["image_path", "probability", "cell_type"])
    if cell_type != "both":
        table = table[table.cell_type == cell_type].reset_index(drop=True)
    table["image_path"] = [str(Path(root) / path) for path in table.image_path]
    table["mask_path"] = ""
    graded = {0.0: LabelName.NORMAL, 1.0: LabelName.ABNORMAL}
    table["label_index"] = [int(graded.get(p, LabelName.UNKNOWN)) for p in table.probability]
    return table


def _with_split(samples: pd.DataFrame, split: Split) -> pd.DataFrame:
    samples = samples.assign(split=split.value).reset_index(drop=True)
    samples.attrs["task"] = "classification"
    return samples
