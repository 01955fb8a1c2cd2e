"""Regions of all images that nobody should look at: clamps, labels, the belt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

_DRAWN = 1024  # pixels a side that polygons are drawn at
_CORNERS = 3
_POLYGONS = (".json", ".yaml", ".yml")


def read_regions(path: str | Path) -> np.ndarray:
    """The regions to ignore, from a picture or a list of polygons.

    Args:
        path (str | Path): A picture of any size, black where images are ignored and white elsewhere; or JSON or YAML:
            polygons, each a list of points ``[x, y]`` in shares of width and height, or
            ``{"size": [height, width], "polygons": ...}`` with points in pixels of an image of that size.

    Returns:
        np.ndarray: ``[H, W]`` bool, true where ignored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be read as either, or ignores nothing or everything.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"There is no {path}. Expected a picture, black where images are ignored, or polygons."
        raise FileNotFoundError(msg)
    ignored = _drawn(path) if path.suffix.lower() in _POLYGONS else _painted(path)
    if ignored.all() or not ignored.any():
        found = "everything" if ignored.all() else "nothing"
        msg = f"{path} ignores {found}. Expected black where images are ignored, white elsewhere; or polygons inside."
        raise ValueError(msg)
    return ignored


def looked_at(ignored: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Places of a grid that are looked at: those of which less than half is ignored.

    Args:
        ignored (np.ndarray): ``[H, W]`` bool, see `read_regions`.
        grid (tuple[int, int]): Rows and columns.

    Returns:
        np.ndarray: ``[rows * columns]`` bool, row by row.

    Raises:
        ValueError: If none is looked at, or all are: the regions are smaller than a place.

    Example:
        >>> ignored = np.zeros((8, 8), dtype=bool)
        >>> ignored[:3, :4] = True
        >>> looked_at(ignored, (2, 2))
        array([False,  True,  True,  True])
    """
    share = Image.fromarray(ignored.astype(np.float32)).resize(grid[::-1], Image.Resampling.BOX)
    looked = (np.asarray(share) < 0.5).ravel()
    if looked.all() or not looked.any():
        found = "none" if looked.all() else "all"
        msg = (
            f"The regions to ignore cover {found} of the {grid[0]} x {grid[1]} places that images are divided into: "
            "half of a place must be covered for it to be ignored, and one must be left. Draw them larger or smaller."
        )
        raise ValueError(msg)
    return looked


def as_text(looked: np.ndarray, grid: tuple[int, int]) -> list[str]:
    """Places for a person's eyes, a text for each row: ``#`` where ignored, ``.`` elsewhere."""
    return ["".join(".#"[not place] for place in row) for row in looked.reshape(grid)]


def _painted(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L")) < 128
    except (OSError, ValueError) as error:
        msg = f"{path} can't be read as a picture ({error}). Expected one, or polygons in a .json or .yaml file."
        raise ValueError(msg) from error


def _drawn(path: Path) -> np.ndarray:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        msg = f"{path} can't be read ({error}). Expected polygons: lists of points [x, y]."
        raise ValueError(msg) from error
    sized = isinstance(content, dict)
    polygons = content.get("polygons") if sized else content
    height, width = _size(path, content.get("size")) if sized else (1.0, 1.0)
    if not isinstance(polygons, list) or not polygons or not all(map(_is_polygon, polygons)):
        msg = f"{path} must hold a list of polygons, each of at least {_CORNERS} points [x, y]."
        raise ValueError(msg)
    farthest = max(max(x / width, y / height) for polygon in polygons for x, y in polygon)
    if not sized and farthest > 1:
        msg = (
            f"{path} has points up to {farthest:g}, which are no shares of width and height. For pixels, write "
            '{"size": [height, width], "polygons": [...]}.'
        )
        raise ValueError(msg)
    canvas = Image.new("1", (_DRAWN, _DRAWN))
    for polygon in polygons:
        corners = [(x / width * _DRAWN, y / height * _DRAWN) for x, y in polygon]
        ImageDraw.Draw(canvas).polygon(corners, fill=1)
    return np.asarray(canvas)


def _size(path: Path, size: Any) -> tuple[float, float]:  # noqa: ANN401
    if not (isinstance(size, list) and len(size) == 2 and all(_is_number(side) and side > 0 for side in size)):
        msg = f"{path} must hold [height, width] of the image as size, found {size!r}."
        raise ValueError(msg)
    return size[0], size[1]


def _is_polygon(value: Any) -> bool:  # noqa: ANN401
    points = isinstance(value, list) and len(value) >= _CORNERS
    return points and all(isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in value)


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, int | float) and not isinstance(value, bool)
