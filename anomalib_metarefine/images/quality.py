"""What is wrong with the pictures themselves: unreadable, blank, blurred, badly exposed, or there twice.

`describe_file` keeps a small descriptor of a decoded image (some numbers and a thumbnail of 16 KB), `judge` makes the
findings from the descriptors of a folder. Images of one production line all look alike, and what is sharp or bright
for one line is not for another: except for what is truly black, white or flat, an image is judged against the others.

References:
    Crete et al., "The Blur Effect: Perception and Estimation with a New No-Reference Perceptual Blur Metric", 2007.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from anomalib_metarefine.images.duplicates import THUMBNAIL, first_of_exact_copies, first_of_near_copies, thumbnail
from anomalib_metarefine.images.reading import ImageFile, read_image, reason_of
from anomalib_metarefine.robust import lower_side_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST_COMPARED = 20_000  # images that near copies are looked for among: 16 KB each, and a comparison of each two
_ENOUGH_FOR_SPREAD = 50  # images; with fewer, a spread is a matter of luck and the widest margin is taken
_ENOUGH_FOR_MEDIAN = 3  # images; with fewer there is nothing to compare with
_SPREADS = 8.0
# Margins (least, widest) to the folder's centre. The least keeps a very uniform folder from flagging trifles, the
# widest keeps a very mixed one from hiding a ruined image.
_BLUR_MARGIN = (0.10, 0.25)  # of the blur effect
_EXPOSURE_MARGIN = (1.5, 2.25)  # stops
_SATURATION_MARGIN = (0.25, 0.5)  # share of the pixels
_STRIP_PIXELS = 2**16  # an image is worked on in strips, whose float copies stay in the processor's cache


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image file."""

    path: str  # the file, as it was given
    sha256: str  # of the file's bytes, hex; empty if they can't be read
    unreadable: str | None  # why it can't be decoded; None if it can
    width: int  # pixels; 0 if unreadable
    height: int  # pixels; 0 if unreadable
    # "exact duplicate of <name>", "near duplicate of <name>", "blank", "blurred", "over-exposed", "under-exposed", "the
    # first of <count> pages", "uses <bits> of 16 bits", and where others lie upright, "turned by its EXIF tag"
    findings: tuple[str, ...] = ()


@dataclass
class Descriptor:
    """One decoded image in a few numbers. Levels are of 255 or, of deep images, of 65,535."""

    sha256: str = ""
    unreadable: str | None = None
    width: int = 0
    height: int = 0
    deep: bool = False  # more than 8 bits per channel
    most: float = 0.0  # the highest level in units of the file, where nobody said how many bits are used
    turned: bool = False  # by EXIF
    misread: str | None = None  # by anomalib's reader, and why
    pages: int = 1
    levels: np.ndarray | None = None  # [4]: mean, 1st, 99th percentile, standard deviation
    clipped: float = 0.0  # share of pixels at 250 of 255 or above
    blur: float = 0.0  # blur effect, 0 sharp to 1
    thumbnail: np.ndarray | None = None  # [64 x 64]


def inspect_images(
    paths: Sequence[str | Path],
    names: Sequence[str] | None = None,
    on_image: Callable[[], None] | None = None,
    bit_depth: int | None = None,
) -> list[ImageFacts]:
    """Decode every image once and say what is wrong with it.

    Colour is judged by its luminance. Near duplicates are copies that were re-encoded, resized, slightly shifted or
    changed in brightness; rotated, mirrored and cropped copies are not found.

    Args:
        paths (Sequence[str | Path]): Image files, 1 to about 10,000.
        names (Sequence[str] | None): What findings call them, one per path; ``None`` takes the paths. The first of a
            group of duplicates is the first by name, and carries no finding of duplication itself.
        on_image (Callable[[], None] | None): Called once per finished image.
        bit_depth (int | None): See `read_image`.

    Returns:
        list[ImageFacts]: In the order of ``paths``.

    Raises:
        ValueError: If the number of names isn't that of the paths.
    """
    names = [str(path) for path in paths] if names is None else list(names)
    if len(names) != len(paths):
        msg = f"Found {len(names)} names for {len(paths)} paths. Pass one name per path, or none."
        raise ValueError(msg)
    images = []
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for image in pool.map(lambda path: describe_file(path, bit_depth)[0], paths):
            images.append(image)
            if on_image is not None:
                on_image()
    return judge(paths, names, images)


def judge(paths: Sequence[str | Path], names: Sequence[str], images: Sequence[Descriptor]) -> list[ImageFacts]:
    """Findings of a folder; of more than `MOST_COMPARED` images without near copies.

    Args:
        paths (Sequence[str | Path]): Of ``N`` images.
        names (Sequence[str]): What findings call them.
        images (Sequence[Descriptor]): Of `describe_file`; deep ones are changed to levels of 255.

    Returns:
        list[ImageFacts]: One an image.
    """
    compared = len(images) <= MOST_COMPARED
    thumbnails = np.zeros((len(images) if compared else 0, THUMBNAIL, THUMBNAIL), np.float32)
    for row, image in enumerate(images):
        if image.thumbnail is not None and compared:
            thumbnails[row] = image.thumbnail
        image.thumbnail = None
    shallow = _to_grey_levels(images, thumbnails)

    findings: list[list[str]] = [[] for _ in images]
    readable = [row for row in sorted(range(len(images)), key=names.__getitem__) if images[row].unreadable is None]
    blank = _blank([images[row] for row in readable], thumbnails[readable] if compared else None)
    exact = first_of_exact_copies([images[row].sha256 for row in readable])
    single = np.flatnonzero((exact == np.arange(len(readable))) & ~blank)
    rows = np.array(readable, dtype=int)[single]
    near = first_of_near_copies(thumbnails[rows]) if compared else np.arange(len(single))
    for position, first in enumerate(exact.tolist()):
        if first != position:
            findings[readable[position]].append(f"exact duplicate of {names[readable[first]]}")
    for position, first in zip(single.tolist(), single[near].tolist(), strict=True):
        if first != position:
            findings[readable[position]].append(f"near duplicate of {names[readable[first]]}")
    for kind, flags in _photographic([images[row] for row in readable], blank).items():
        for position in np.flatnonzero(flags).tolist():
            findings[readable[position]].append(kind)
    some_lie_upright = any(not images[row].turned for row in readable)
    for row in readable:
        if images[row].turned and some_lie_upright:
            findings[row].append("turned by its EXIF tag")
        if images[row].pages > 1:
            findings[row].append(f"the first of {images[row].pages} pages")
        if images[row].most and shallow:
            findings[row].append(f"uses {shallow} of 16 bits")
    return [
        ImageFacts(str(path), image.sha256, image.unreadable, image.width, image.height, tuple(found))
        for path, image, found in zip(paths, images, findings, strict=True)
    ]


def blur_effect(grey: np.ndarray, window: int = 11) -> float:
    """How little an image changes when it is blurred again: 0 is sharp, towards 1 is blurred.

    The measure of `skimage.measure.blur_effect` to within 0.01, in strips: a tenth of the time, and little memory.

    Args:
        grey (np.ndarray): ``[H x W]``, any scale.
        window (int): Pixels of the box that blurs again.

    Returns:
        float: The worse of the two axes; 0 if the image is constant.
    """
    edges, lost = np.zeros(2), np.zeros(2)
    rows = max(4 * window, _STRIP_PIXELS // grey.shape[1])
    for start in range(0, grey.shape[0], rows):
        top = max(start - window, 0)  # the neighbouring rows that the box reaches
        strip = grey[top : start + rows + window].astype(np.float32)
        own = slice(start - top, start - top + rows)
        for axis, (box, derivative) in enumerate((((1, window), (0, 1)), ((window, 1), (1, 0)))):
            sharp = np.abs(cv2.Sobel(strip, cv2.CV_32F, *derivative))[own]
            again = np.abs(cv2.Sobel(cv2.blur(strip, box), cv2.CV_32F, *derivative))[own]
            edges[axis] += sharp.sum(dtype=np.float64)
            lost[axis] += np.maximum(sharp - again, 0).sum(dtype=np.float64)
    return float(np.max(1 - lost[edges > 0] / edges[edges > 0], initial=0.0))


def describe_file(path: str | Path, bit_depth: int | None = None) -> tuple[Descriptor, ImageFile | None]:
    """Read an image file and describe it; there is no image if it can't be read."""
    try:
        image = read_image(path, bit_depth)
    except (OSError, ValueError) as error:
        return Descriptor(sha256=getattr(error, "sha256", ""), unreadable=reason_of(error)), None
    return _descriptor(image, bit_depth), image


def _descriptor(image: ImageFile, bit_depth: int | None) -> Descriptor:
    deep = image.levels.dtype != np.uint8
    if deep:
        grey = cv2.cvtColor((image.pixels * (2**16 - 1)).round().astype(np.uint16), cv2.COLOR_RGB2GRAY)
    else:
        grey = np.asarray(Image.fromarray(image.levels).convert("L"))
    bins = 2**16 if deep else 2**8
    counts = cv2.calcHist([grey], [0], None, [bins], [0, bins]).ravel().astype(np.float64)
    share = counts / counts.sum()
    values, cumulated = np.arange(bins), np.cumsum(share)
    mean = share @ values
    quantiles = np.searchsorted(cumulated, [0.01, 0.99])
    return Descriptor(
        sha256=image.sha256,
        height=grey.shape[0],
        width=grey.shape[1],
        deep=deep,
        most=float(image.levels.max()) if image.white == 2**16 - 1 and bit_depth is None else 0.0,
        misread=image.misread,
        turned=image.turned,
        pages=image.pages,
        levels=np.array([mean, *quantiles, np.sqrt(share @ (values - mean) ** 2)]),
        # Deep files are rarely clipped at the end of their range; the other criteria of over-exposure are theirs.
        clipped=0.0 if deep else float(share[250:].sum()),
        blur=blur_effect(grey),
        thumbnail=thumbnail(grey),
    )


def _to_grey_levels(images: Sequence[Descriptor], thumbnails: np.ndarray) -> int | None:
    """Bring levels and thumbnails of deep images to 0..255, in place.

    A 12-bit camera writes 16-bit files that use a sixteenth of the range: the depth is the smallest usual one that
    holds the brightest pixel of the folder.

    Returns:
        int | None: That depth, where it is not the files'.
    """
    brightest = max((image.most for image in images), default=0.0)
    bits = next(bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits)
    bits = bits if brightest else 16
    for row, image in enumerate(images):
        if image.deep:
            scale = 255 / (2 ** (bits if image.most else 16) - 1)
            image.levels = image.levels * scale
            if len(thumbnails):
                thumbnails[row] *= scale
    return bits if bits < 16 else None


def _blank(images: list[Descriptor], thumbnails: np.ndarray | None) -> np.ndarray:
    """Flat to within rounding, or without any structure past noise where the folder's other images have some."""
    if not images:
        return np.zeros(0, bool)
    flat = np.array([image.levels is not None and image.levels[3] < 0.5 for image in images])
    if thumbnails is not None and len(images) >= _ENOUGH_FOR_MEDIAN:
        structure = thumbnails.std(axis=(1, 2))
        flat |= (structure < 2) & (structure < np.median(structure) / 8)
    return flat


def _photographic(images: list[Descriptor], blank: np.ndarray) -> dict[str, np.ndarray]:
    """Flags ``[N]`` of each photographic finding."""
    if not images:
        return {}
    levels = np.array([image.levels for image in images])
    mean, dark, bright = levels[:, 0], levels[:, 1], levels[:, 2]
    usual = ~blank
    # Light that is missing changes the highlights and the mean alike; a dark part in the picture only the mean.
    under = np.minimum(
        _past_margin(-np.log2(mean + 1), usual, _EXPOSURE_MARGIN),
        _past_margin(-np.log2(bright + 1), usual, _EXPOSURE_MARGIN),
    )
    over = np.minimum(
        _past_margin(-np.log2(256 - mean), usual, _EXPOSURE_MARGIN),
        _past_margin(-np.log2(256 - dark), usual, _EXPOSURE_MARGIN),
    )
    clipped = _past_margin(np.array([image.clipped for image in images]), usual, _SATURATION_MARGIN)
    blur = _past_margin(np.array([image.blur for image in images]), usual, _BLUR_MARGIN)
    return {
        "blank": blank,
        "blurred": (blur > 0) & usual,
        "over-exposed": (over > 0) | (clipped > 0) | (dark > 245),
        "under-exposed": (under > 0) | (bright < 10),
    }


def _past_margin(values: np.ndarray, usual: np.ndarray, margin: tuple[float, float]) -> np.ndarray:
    """How far ``values`` (``[N]``, higher is worse) lie past the folder's centre and a margin; positive: outlier."""
    reference = values[usual]
    if len(reference) < _ENOUGH_FOR_MEDIAN:
        return np.full(len(values), -np.inf)
    if len(reference) < _ENOUGH_FOR_SPREAD:
        return values - np.median(reference) - margin[1]
    centre, spread = lower_side_scale(reference)
    return values - centre - np.clip(_SPREADS * spread, *margin)
