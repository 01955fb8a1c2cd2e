"""Data sets as the command lines of the studies have them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from anomalib_metarefine.benchmark.data_sets import DataSet

_SPEC = re.compile(r"(?P<where>.+?)(?:@(?P<height>\d+)x(?P<width>\d+))?(?::(?P<images>\d+))?(?::(?P<name>[^:/\\]+))?")
_ELPV = {"elpv-mono": "mono", "elpv-poly": "poly"}
_ELPV_TRAIN_IMAGES = 300


def parse_data_set(spec: str) -> DataSet:
    """Read ``WHERE[@HxW][:TRAIN_IMAGES][:NAME]``.

    Args:
        spec (str): E.g. ``"elpv-mono"``, ``"parts/screw:150"`` or ``"parts/belt@160x400:120:belt"``.

    Returns:
        DataSet: The data set. ELPV has 300 training images by default.

    Raises:
        ValueError: If the text can't be read so.
        FileNotFoundError: If a folder is not in MVTec layout.

    Example:
        >>> parse_data_set("elpv-mono@224x224:200").image_size
        (224, 224)
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        msg = f"A data set is written as WHERE[@HxW][:TRAIN_IMAGES][:NAME], e.g. folder@160x400:120, found {spec!r}."
        raise ValueError(msg)
    where, images = match["where"], int(match["images"]) if match["images"] else None
    size = (int(match["height"]), int(match["width"])) if match["height"] else DataSet.image_size
    if where in _ELPV:
        images = images or _ELPV_TRAIN_IMAGES
        arguments = {"cell_type": _ELPV[where], "train_images": images}
        return DataSet(match["name"] or where, "ELPV", arguments, "", size, images)
    name = match["name"] or Path(where).resolve().name
    return DataSet(name, "Folder", _folder_arguments(name, where), "", size, images)


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
