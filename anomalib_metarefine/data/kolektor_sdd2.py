"""KolektorSDD2: surface defects on a production line, with a mask for every image.

License:
    Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International (CC BY-NC-SA 4.0), see
    https://www.vicos.si/resources/kolektorsdd2/.

References:
    Božič, Tabernik, Skočaj, "Mixed supervision for surface-defect detection: from weakly to fully supervised
    learning", Computers in Industry 2021.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import DownloadInfo, LabelName, Split, TestSplitMode, ValSplitMode, download_and_extract
from anomalib.data.utils.download import check_hash
from anomalib.utils.path import resolve_dataset_root
from PIL import Image
from torchvision.transforms.v2 import Transform

logger = logging.getLogger(__name__)

TrainDefects = Literal["drop", "keep", "test"]

# The authors publish no checksum. Independent projects computed this one from the official download, 853,126,555 bytes:
# github.com/tuckedup/AeroSurface-RT (docs/datasets.md), github.com/USEU117/reference-matching-interaction-ad
# (data/README.md).
DOWNLOAD_INFO = DownloadInfo(
    name="KolektorSDD2",
    url="https://go.vicos.si/kolektorsdd2",
    hashsum="edcdb486809b24f1d17b785e30c52fafc5999554dd5fe18ddf77b61ceb6f36a8",
    filename="KolektorSDD2.zip",
)
OFFICIAL_IMAGES = {Split.TRAIN: 2331, Split.TEST: 1004}


class KolektorSDD2Dataset(AnomalibDataset):
    """Images of one split, or of both.

    Args:
        root (Path | str | None): Folder with ``train/`` and ``test/``; ``None`` takes anomalib's folder of data sets.
        augmentations (Transform | None): Applied to every image.
        split (str | Split | None): ``Split.TRAIN``, ``Split.TEST``, or ``None`` for both.
        train_defects (TrainDefects): What becomes of the official training set's defective images, see `KolektorSDD2`.

    Example:
        >>> dataset = KolektorSDD2Dataset(root="./datasets/KolektorSDD2", split="test")  # doctest: +SKIP
        >>> dataset[0].image.shape  # doctest: +SKIP
        torch.Size([3, 633, 229])
    """

    def __init__(
        self,
        root: Path | str | None = None,
        augmentations: Transform | None = None,
        split: str | Split | None = None,
        train_defects: TrainDefects = "drop",
    ) -> None:
        super().__init__(augmentations=augmentations)
        self.root = resolve_dataset_root(root, "KolektorSDD2")
        self.split = split
        self.samples = make_kolektor_sdd2_samples(self.root, split, train_defects)


class KolektorSDD2(AnomalibDataModule):
    """3,335 images of production parts, about 230 x 630 pixels each, 356 of them with a defect.

    The official split has 2,331 training images, of which 246 are defective, and 1,004 test images, of which 110 are.
    An image is defective if its mask has a pixel that is not zero. Detectors of anomalies train on good images, so
    ``train_defects`` says what becomes of the 246:

    - ``"drop"``: they are in neither split. 2,085 good images to train on, the official test set.
    - ``"keep"``: they stay in the training set and count as good there. This is the data set's own contamination,
      10.6 %; `unlabelled_defects` lists them.
    - ``"test"``: they join the test set, which then has 356 defective images: more for `Contaminated` to draw from.
      Such a test set is not the official one.

    Images vary in size: a model's pre-processor, or ``augmentations``, must resize them.

    Args:
        root (Path | str | None): Folder with ``train/`` and ``test/``; ``None`` takes anomalib's folder of data sets.
        train_defects (TrainDefects): ``"drop"``, ``"keep"`` or ``"test"``, see above.
        train_batch_size (int): Batch size of the training dataloader.
        eval_batch_size (int): Batch size of the other dataloaders.
        num_workers (int): Workers of each dataloader.
        test_split_mode (TestSplitMode | str): Where test images come from.
        val_split_mode (ValSplitMode | str): Where validation images come from.
        **settings (Any): See `AnomalibDataModule`.

    Raises:
        ValueError: If ``train_defects`` is unknown.

    Example:
        >>> datamodule = KolektorSDD2(root="./datasets/KolektorSDD2")
        >>> datamodule.prepare_data()  # doctest: +SKIP
        >>> datamodule.setup()  # doctest: +SKIP
        >>> len(datamodule.train_data), len(datamodule.test_data)  # doctest: +SKIP
        (2085, 1004)
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/KolektorSDD2",
        train_defects: TrainDefects = "drop",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=test_split_mode,
            val_split_mode=val_split_mode,
            **settings,
        )
        _check_train_defects(train_defects)
        self.root = resolve_dataset_root(root, "KolektorSDD2")
        self.train_defects = train_defects

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = KolektorSDD2Dataset(self.root, split=Split.TRAIN, train_defects=self.train_defects)
        self.test_data = KolektorSDD2Dataset(self.root, split=Split.TEST, train_defects=self.train_defects)

    @property
    def unlabelled_defects(self) -> list[str]:
        """Paths of the defective images in the training set; empty unless ``train_defects`` is ``"keep"``."""
        samples = self.train_data.samples
        return samples.image_path[samples.label == "bad"].tolist()

    def prepare_data(self) -> None:
        """Download and unpack the data set (853 MB), unless there is a folder ``train`` already.

        Afterwards there are ``train/10000.png``, its mask ``train/10000_GT.png``, ``test/20000.png`` and so on. An
        archive that was fetched by hand and put there as ``KolektorSDD2.zip`` is unpacked instead.

        Raises:
            RuntimeError: If it can't be fetched, or is not the official archive.
        """
        if (self.root / Split.TRAIN.value).is_dir():
            logger.info("Found the dataset.")
            return
        archive = self.root / DOWNLOAD_INFO.filename
        try:
            if archive.is_file():  # checked here: `download_and_extract` checks only what it has fetched itself
                check_hash(archive, DOWNLOAD_INFO.hashsum)
            download_and_extract(self.root, DOWNLOAD_INFO)
        except (OSError, ValueError) as error:  # no connection, no space, another checksum
            msg = (
                f"KolektorSDD2 could not be had: {error} Delete {archive} if there is one and try again; or fetch "
                f"{DOWNLOAD_INFO.url} by hand and unpack it, so that there are {self.root}/train and {self.root}/test."
            )
            raise RuntimeError(msg) from error


def make_kolektor_sdd2_samples(
    root: Path | str,
    split: str | Split | None = None,
    train_defects: TrainDefects = "drop",
) -> pd.DataFrame:
    """The samples table of anomalib, read from the images' names and masks.

    ``train/10000.png`` is an image, ``train/10000_GT.png`` its mask. Files with other names are left out: the official
    archive holds a ``10301 (copy).png``, and its mask, which are copies of ``10301.png`` and its mask.

    Args:
        root (Path | str): Folder with ``train/`` and ``test/``.
        split (str | Split | None): ``Split.TRAIN``, ``Split.TEST``, or ``None`` for both.
        train_defects (TrainDefects): What becomes of the official training set's defective images, see `KolektorSDD2`.

    Returns:
        pd.DataFrame: ``image_path``, ``mask_path``, ``split``, ``label`` (``"good"`` or ``"bad"``, from the mask) and
            ``label_index`` (1 for the defective, but 0 for those that ``train_defects="keep"`` leaves unlabelled).

    Raises:
        FileNotFoundError: If there are no images, or one has no mask.
        ValueError: If ``train_defects`` is unknown, or a mask can't be read.
    """
    _check_train_defects(train_defects)
    wanted = set(OFFICIAL_IMAGES) if split is None else {Split(split)}
    sources = wanted | {Split.TRAIN} if train_defects == "test" else wanted
    samples = pd.concat([_read_split(Path(root), source) for source in OFFICIAL_IMAGES if source in sources])
    from_training = (samples.split == Split.TRAIN.value) & (samples.label == "bad")
    if train_defects == "drop":
        samples = samples[~from_training]
    elif train_defects == "keep":
        samples.loc[from_training, "label_index"] = int(LabelName.NORMAL)
    else:
        samples.loc[from_training, "split"] = Split.TEST.value
    samples = samples[samples.split.isin([one.value for one in wanted])].reset_index(drop=True)
    samples.attrs["task"] = "segmentation"
    return samples


def _read_split(root: Path, split: Split) -> pd.DataFrame:
    """The images of ``root/train`` or ``root/test``, labelled by their masks."""
    folder = root / split.value
    images = sorted(path for path in folder.glob("*.png") if path.stem.isdecimal())
    if not images:
        msg = (
            f"No images in {folder}. Expected train/10000.png, train/10000_GT.png, test/20000.png and so on under "
            f"{root}: run prepare_data(), or unpack {DOWNLOAD_INFO.url} there."
        )
        raise FileNotFoundError(msg)
    masks = [path.with_name(f"{path.stem}_GT.png") for path in images]
    missing = [image for image, mask in zip(images, masks, strict=True) if not mask.is_file()]
    if missing:
        msg = (
            f"{missing[0]} has no mask {missing[0].stem}_GT.png beside it, and {len(missing)} of the {len(images)} "
            f"images in {folder} have none. Labels come from masks: unpack {DOWNLOAD_INFO.url} again."
        )
        raise FileNotFoundError(msg)
    if len(images) != OFFICIAL_IMAGES[split]:
        logger.warning(
            "%s has %d images, the official data set %d: figures won't compare with published ones.",
            folder, len(images), OFFICIAL_IMAGES[split],
        )  # fmt: skip
    with ThreadPoolExecutor() as pool:
        defective = list(pool.map(has_defect, masks))
    return pd.DataFrame(
        {
            "image_path": [str(path) for path in images],
            "mask_path": [str(path) for path in masks],
            "split": split.value,
            "label": ["bad" if found else "good" for found in defective],
            "label_index": [int(LabelName.ABNORMAL if found else LabelName.NORMAL) for found in defective],
        }
    )


def has_defect(mask: Path | str) -> bool:
    """Whether a mask has a pixel that is not zero.

    Raises:
        ValueError: If the file can't be read as an image.
    """
    try:
        with Image.open(mask) as image:
            return image.convert("L").getbbox() is not None
    except OSError as error:
        msg = f"The mask {mask} can't be read: {error}. Unpack {DOWNLOAD_INFO.url} again."
        raise ValueError(msg) from error


def _check_train_defects(train_defects: str) -> None:
    if train_defects not in get_args(TrainDefects):
        msg = f"train_defects must be 'drop', 'keep' or 'test', found {train_defects!r}."
        raise ValueError(msg)
