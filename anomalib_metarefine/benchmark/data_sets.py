"""The data sets of a benchmark, as they are named on its command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.data.elpv import ELPV

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
        where (str): ``"elpv-mono"``, ``"elpv-poly"``, or a category folder in MVTec layout.
        image_size (tuple[int, int]): Height and width that images are resized to.
        train_images (int | None): Size of the training set, dirty images included; ``None``: as many as are good.
    """

    name: str
    where: str
    image_size: tuple[int, int] = (256, 256)
    train_images: int | None = None

    @classmethod
    def parse(cls, spec: str) -> DataSet:
        """Read ``WHERE[@HxW][:TRAIN_IMAGES][:NAME]``.

        Args:
            spec (str): E.g. ``"elpv-mono"``, ``"parts/screw:150"`` or ``"parts/belt@160x400:120:belt"``.

        Returns:
            DataSet: The data set. ELPV has 300 training images by default.

        Raises:
            ValueError: If the text can't be read so.
            FileNotFoundError: If a folder is not in MVTec layout.

        Example:
            >>> DataSet.parse("elpv-mono@224x224:200")
            DataSet(name='elpv-mono', where='elpv-mono', image_size=(224, 224), train_images=200)
        """
        match = _SPEC.fullmatch(spec)
        if match is None:
            msg = (
                f"A data set is written as WHERE[@HxW][:TRAIN_IMAGES][:NAME], e.g. folder@160x400:120, found {spec!r}."
            )
            raise ValueError(msg)
        where, images = match["where"], match["images"]
        size = (int(match["height"]), int(match["width"])) if match["height"] else cls.image_size
        if where in _ELPV:
            return cls(match["name"] or where, where, size, int(images or _ELPV_TRAIN_IMAGES))
        for part in ("train/good", "test/good"):
            if not (Path(where) / part).is_dir():
                msg = (
                    f"{where} is neither {' nor '.join(_ELPV)} nor a category in MVTec layout: it has no folder {part}."
                )
                raise FileNotFoundError(msg)
        return cls(match["name"] or Path(where).resolve().name, where, size, int(images) if images else None)

    def datamodule(self, seed: int) -> AnomalibDataModule:
        """The datamodule of its clean images; ``seed`` draws ELPV's training images."""
        if self.where in _ELPV:
            return ELPV(_ELPV[self.where], self.train_images or _ELPV_TRAIN_IMAGES, seed=seed)
        from anomalib.data import Folder

        root = Path(self.where)
        defects = sorted(folder.name for folder in (root / "test").iterdir() if folder.is_dir())
        defects.remove("good")
        # Not anomalib's MVTecAD, which reads PNG files only.
        return Folder(
            name=self.name,
            root=root,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{defect}" for defect in defects],
            num_workers=0,
            val_split_mode="none",  # by default it would take half of the test set
        )
