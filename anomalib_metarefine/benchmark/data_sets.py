"""The data sets of a benchmark: a datamodule of clean images, and how it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule

_SPEC = re.compile(r"(?P<where>.+?)(?:@(?P<height>\d+)x(?P<width>\d+))?(?::(?P<images>\d+))?(?::(?P<name>[^:/\\]+))?")
_ELPV = {"elpv-mono": "mono", "elpv-poly": "poly"}
_ELPV_TRAIN_IMAGES = 300


@dataclass(frozen=True)
class DataSet:
    """One data set and how it is read.

    Attributes:
        name (str): Its name in the table.
        class_path (str): A datamodule of anomalib, or of a plugin, as anomalib's configurations name it.
        init_args (dict[str, Any]): Its arguments.
        category (str): Its category in the table; empty if it has none.
        image_size (tuple[int, int]): Height and width that images are resized to.
        train_images (int | None): Size of the training set, dirty images included; ``None``: as many as are good.
    """

    name: str
    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    category: str = ""
    image_size: tuple[int, int] = (256, 256)
    train_images: int | None = None

    @classmethod
    def parse(cls, spec: str) -> DataSet:
        """Read ``WHERE[@HxW][:TRAIN_IMAGES][:NAME]``, as the small benchmarks' command lines have it.

        Args:
            spec (str): E.g. ``"elpv-mono"``, ``"parts/screw:150"`` or ``"parts/belt@160x400:120:belt"``.

        Returns:
            DataSet: The data set. ELPV has 300 training images by default.

        Raises:
            ValueError: If the text can't be read so.
            FileNotFoundError: If a folder is not in MVTec layout.

        Example:
            >>> DataSet.parse("elpv-mono@224x224:200").image_size
            (224, 224)
        """
        match = _SPEC.fullmatch(spec)
        if match is None:
            msg = (
                f"A data set is written as WHERE[@HxW][:TRAIN_IMAGES][:NAME], e.g. folder@160x400:120, found {spec!r}."
            )
            raise ValueError(msg)
        where, images = match["where"], int(match["images"]) if match["images"] else None
        size = (int(match["height"]), int(match["width"])) if match["height"] else cls.image_size
        if where in _ELPV:
            images = images or _ELPV_TRAIN_IMAGES
            arguments = {"cell_type": _ELPV[where], "train_images": images}
            return cls(match["name"] or where, "ELPV", arguments, "", size, images)
        name = match["name"] or Path(where).resolve().name
        return cls(name, "Folder", _folder_arguments(name, where), "", size, images)

    def datamodule(self, seed: int) -> AnomalibDataModule:
        """The datamodule of its clean images, without a validation split; ``seed`` draws ELPV's training images."""
        import anomalib.data

        # Not `get_datamodule`: lists among the arguments would reach the class as OmegaConf's own kind.
        name = self.class_path.rpartition(".")[2]
        if not hasattr(anomalib.data, name):
            msg = f"{self.name}: anomalib.data has no datamodule {name!r}. Check class_path in the configuration."
            raise ValueError(msg)
        datamodule = getattr(anomalib.data, name)(**self.init_args)
        if "seed" not in self.init_args:
            datamodule.seed = seed
        datamodule.val_split_mode = anomalib.data.utils.ValSplitMode.NONE  # some would take half of the test set
        return datamodule


def _folder_arguments(name: str, where: str) -> dict[str, Any]:
    """Of anomalib's `Folder`, for a category in MVTec layout; its `MVTecAD` reads PNG files only."""
    for part in ("train/good", "test/good"):
        if not (Path(where) / part).is_dir():
            msg = f"{where} is neither {' nor '.join(_ELPV)} nor a category in MVTec layout: it has no folder {part}."
            raise FileNotFoundError(msg)
    defects = sorted(folder.name for folder in (Path(where) / "test").iterdir() if folder.is_dir())
    defects.remove("good")
    return {
        "name": name,
        "root": where,
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": [f"test/{defect}" for defect in defects],
        "num_workers": 0,
    }
