"""Repair: a place that looks unusual is replaced by the same place of another image, for models that take whole images.

Where no image stands apart as a whole, refinement leaves out regions of images (`refinement/patches.py`). Other models
can't do that, but an image without its defect serves them as well: the region is taken from the image that fits its
surroundings best, brought to their brightness, and faded in. This is for parts that lie alike in all images; for others
there are no such regions to begin with.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from anomalib_metarefine.images.reading import read_bytes, turned_upright

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anomalib_metarefine.curation.evidence import Evidence

_MOST_DONORS = 300  # compared with for every region; as many as refinement compares images with
_SAMPLES = 4  # pixels a patch is compared by, in each direction
_LARGEST = 0.5  # of the image: a region beyond is no local defect
_FULL = 1.6  # how steeply a region fades: its patches are replaced entirely, those around it in part
_QUALITY = {  # of a file format; past 100, WebP is without loss
    ".jpg": [cv2.IMWRITE_JPEG_QUALITY, 98],
    ".jpeg": [cv2.IMWRITE_JPEG_QUALITY, 98],
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, 101],
}
_NEIGHBOURS = np.ones((3, 3), dtype=bool)  # diagonal ones are neighbours too


class Transplant(NamedTuple):
    """A region that was replaced."""

    left: int  # of the box around the region, pixels, as are the next three
    top: int  # from above
    width: int  # columns
    height: int  # rows
    donor: Path  # the image that it was taken from


class Repaired(NamedTuple):
    """An image without its unusual regions."""

    image: np.ndarray  # [H x W] or [H x W x C], of the type that the file has
    transplants: list[Transplant]  # what was replaced
    left: int  # regions that stayed as they were: too large, or no other image of the kind is usual there


class Repairer:
    """Repairs images from each other.

    Args:
        paths (Sequence[Path]): The ``N`` images that count as normal, each readable.
        unusual (np.ndarray): ``[N x R x C]`` mask of their unusual patches.
        seed (int): Which images are donors, where there are more than 300.

    Raises:
        ValueError: If there is not one mask for each image.
    """

    def __init__(self, paths: Sequence[Path], unusual: np.ndarray, seed: int = 0) -> None:
        if unusual.shape[:1] != (len(paths),) or unusual.ndim != 3:
            msg = f"Expected one mask [rows x columns] for each of {len(paths)} images, found shape {unusual.shape}."
            raise ValueError(msg)
        self._paths, self._unusual = list(paths), unusual
        chosen = np.random.default_rng(seed).permutation(len(self._paths))[:_MOST_DONORS]
        self._donors = np.sort(chosen)
        self._small = dict(zip(self._donors.tolist(), self._thumbnails(self._donors), strict=True))

    @classmethod
    def of(cls, names: Sequence[str], paths: Sequence[Path], evidence: Evidence) -> Repairer:
        """For images of a curation that are not rejected, whose evidence knows them by ``names``."""
        known = dict(zip(evidence.unusual_in, evidence.unusual, strict=True))
        nothing = np.zeros(evidence.unusual.shape[1:], dtype=bool)
        return cls(paths, np.array([known.get(name, nothing) for name in names]).reshape(len(paths), *nothing.shape))

    @property
    def spoilt(self) -> list[int]:
        """Images with unusual patches, those with most of them first."""
        counts = self._unusual.sum((1, 2))
        return [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]

    def mask(self, index: int) -> np.ndarray:
        """Unusual patches of an image, ``[R x C]``."""
        return self._unusual[index]

    def repair(self, index: int) -> Repaired:
        """Replace the unusual regions of an image.

        Args:
            index (int): Its place among the images.

        Returns:
            Repaired: Same size, channels and type as the file's.

        Raises:
            OSError: If the image or a donor can't be read.
        """
        image = read_pixels(self._paths[index])
        small = _thumbnail(image, self._unusual.shape[1:])
        result, transplants, left = image.astype(np.float32), [], 0
        for region, ring in regions(self._unusual[index]):
            donor = self._find_donor(region, ring, small)
            if donor is None:
                left += 1
                continue
            pixels = read_pixels(self._paths[donor]).astype(np.float32)
            if pixels.shape[:2] != image.shape[:2]:
                pixels = cv2.resize(pixels, image.shape[1::-1], interpolation=cv2.INTER_AREA)
            result = _fade_in(result, pixels, region, ring)
            transplants.append(Transplant(*_box(region, image.shape[:2]), self._paths[donor]))
        if np.issubdtype(image.dtype, np.integer):
            limits = np.iinfo(image.dtype)
            result = np.rint(result).clip(limits.min, limits.max)
        return Repaired(result.astype(image.dtype), transplants, left)

    def _find_donor(self, region: np.ndarray, ring: np.ndarray, small: _Small) -> int | None:
        """The image that is most like ``small`` around a region; none if all are unusual in it."""
        if region.mean() > _LARGEST:
            return None
        usual = ~self._unusual[self._donors][:, region].any(1)  # never the image itself
        fitting = [i for i in self._donors[usual].tolist() if self._small[i].kind == small.kind]
        if not fitting:
            return None
        around = np.kron(ring, np.ones((_SAMPLES, _SAMPLES), dtype=bool))
        differences = [np.abs(self._small[i].grey[around] - small.grey[around]).mean() for i in fitting]
        return fitting[int(np.argmin(differences))]

    def _thumbnails(self, images: np.ndarray) -> Iterator[_Small]:
        grid = self._unusual.shape[1:]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            yield from pool.map(lambda i: _thumbnail(read_pixels(self._paths[i]), grid), images)


class _Small(NamedTuple):
    grey: np.ndarray  # [4 R x 4 C], levels of the file
    kind: tuple[int, str]  # channels and type: only alike can be pasted


def read_pixels(path: Path) -> np.ndarray:
    """An image upright, else as it is in its file, ``[H x W]`` or ``[H x W x C]`` with blue first, of any depth.

    Not through `read_image`: a copy is to have the channels and levels of its original.

    Raises:
        OSError: If it can't be read.
        UnreadableImageError: If it is no regular file, or too large.
    """
    content = read_bytes(path)
    image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        msg = f"{path} can't be decoded. Expected a PNG, JPEG, BMP, TIFF or WebP file."
        raise OSError(msg)
    return turned_upright(image, content)


def encoded(image: np.ndarray, suffix: str) -> bytes:
    """The bytes of an image file in the format of a file name's suffix; JPEG and WebP with next to no loss.

    Raises:
        ValueError: If the suffix is that of no format.
    """
    if not cv2.haveImageWriter(f"image{suffix}"):
        msg = f"Images named *{suffix} can't be written. Expected .png, .jpg, .bmp, .tif or .webp."
        raise ValueError(msg)
    return cv2.imencode(suffix, image, _QUALITY.get(suffix.lower(), []))[1].tobytes()


def regions(unusual: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Connected regions of unusual patches, and the ring of patches around each.

    Args:
        unusual (np.ndarray): ``[R x C]`` mask.

    Yields:
        tuple[np.ndarray, np.ndarray]: Masks ``[R x C]``. The ring lies in no region; it may be empty.

    Example:
        >>> corner = np.zeros((3, 4), dtype=bool)
        >>> corner[0, 0] = True
        >>> region, ring = next(regions(corner))
        >>> region.sum(), ring.sum()
        (np.int64(1), np.int64(3))
    """
    labels, count = ndimage.label(unusual, _NEIGHBOURS)
    for number in range(1, count + 1):
        region = labels == number
        yield region, ndimage.binary_dilation(region, _NEIGHBOURS) & ~region


def _fade_in(image: np.ndarray, donor: np.ndarray, region: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """The donor's region over the image, at the brightness of the image's ring."""
    height, width = image.shape[:2]
    around = cv2.resize(ring.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    if around.any():
        donor = donor + (image[around].mean(0) - donor[around].mean(0))
    # Poisson blending (cv2.seamlessClone) needs a margin that regions at the edge of the image do not have.
    cover = cv2.resize(region.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    spread = (width / region.shape[1] / 2, height / region.shape[0] / 2)  # half a patch
    cover = np.clip(_FULL * cv2.GaussianBlur(cover, (0, 0), sigmaX=spread[0], sigmaY=spread[1]), 0, 1)
    cover = cover.reshape(height, width, *[1] * (image.ndim - 2))
    return image + cover * (donor - image)


def _box(region: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the pixels of a region."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    y, x = size[0] / region.shape[0], size[1] / region.shape[1]
    top, left = int(rows[0] * y), int(columns[0] * x)
    return left, top, round((columns[-1] + 1) * x) - left, round((rows[-1] + 1) * y) - top


def _thumbnail(image: np.ndarray, grid: tuple[int, int]) -> _Small:
    size = (_SAMPLES * grid[1], _SAMPLES * grid[0])
    channels = image.shape[2] if image.ndim == 3 else 1
    small = cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)  # it knows no 32-bit integers
    return _Small(small.reshape(size[1], size[0], channels).mean(2), (channels, str(image.dtype)))
