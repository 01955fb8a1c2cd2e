"""The one decoder: every image of a run goes through `read_image`, in training, curation and on the line.

A file is read once, and its pixels and its SHA-256 come from the same bytes. What a file means:

- **8 bits or fewer** (grey, palette, 1 bit, RGB, CMYK): exactly what anomalib's reader gives, divided by 255.
- **Deeper unsigned integers** (16-bit PNG and TIFF): divided by the full scale of the file's depth, or of ``bit_depth``
  where a camera uses fewer bits than the file holds.
- **32-bit or signed integers**: no full scale is known, so they are refused without ``bit_depth``.
- **Floating point**: taken as it is if it lies in [0, 1], refused otherwise.
- **Transparency**: laid over black.
- **Several pages**: the first; `ImageFile.pages` says how many there are.
- **EXIF orientation**: applied, so that an image is upright as any viewer shows it.

Only regular files and objects of a storage are read, of at most 1 GiB. This module imports neither torch nor anomalib.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from anomalib_metarefine.images import storage
from anomalib_metarefine.images.deep import SIXTEEN_BITS, TIFF, RefusedError, bits_per_channel, decode_deep, rgb_levels
from anomalib_metarefine.images.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # of image files, in any case
LARGEST_FILE = 2**30  # bytes

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF orientation
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


class UnreadableImageError(ValueError):
    """A file that is there, but can't be taken as an image; the message names it.

    Attributes:
        reason (str): Why, without its name.
        sha256 (str): Of its content; empty if that was not read.
    """

    def __init__(self, name: str, reason: str, sha256: str = "") -> None:
        self.reason, self.sha256 = reason, sha256
        super().__init__(f"{name} can't be read as an image: {reason}")


@dataclass(frozen=True)
class ImageFile:
    """An image, upright and in RGB.

    Attributes:
        levels (np.ndarray): ``[H x W x 3]``, levels of the file: uint8, uint16 or floating point.
        white (float): The level of full scale: 255 for 8 bits, 65,535 for 16, 1 for floating point.
        sha256 (str): Of the very bytes that were decoded, hex.
        grey (bool): The file holds one channel, and perhaps transparency.
        turned (bool): The file lies on its side, and its EXIF tag says how to turn it.
        pages (int): Of which this is the first.
        misread (str | None): Why anomalib's reader gives other pixels; ``None`` if it gives the same.
    """

    levels: np.ndarray
    white: float
    sha256: str
    grey: bool = False
    turned: bool = False
    pages: int = 1
    misread: str | None = None

    @property
    def pixels(self) -> np.ndarray:
        """``[H x W x 3]`` float32 in [0, 1]."""
        if self.levels.dtype == np.uint8:  # as torch divides a tensor by a number, to the last bit
            return self.levels * np.float32(1 / 255)
        return self.levels.astype(np.float32) / np.float32(self.white)

    @property
    def is_constant(self) -> bool:
        """Whether all pixels have one colour."""
        return bool((self.levels == self.levels[0, 0]).all())


@dataclass(frozen=True)
class CheckedImages:
    """What reading image files gave.

    Attributes:
        hashes (dict[str, str]): SHA-256 of the content of each readable file, by path.
        unreadable (dict[str, str]): Reason, by path, for each file that is empty, truncated or no image at all.
        misread (dict[str, str]): Reason, by path, for each file of which anomalib's reader gives other pixels.
        constant (list[str]): Paths of images of a single colour.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    misread: dict[str, str] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)

    def require_as_trained(self, count: int) -> None:
        """Raise ValueError if anomalib's datamodules would hand on other pixels, or all images are a single colour."""
        if self.misread:
            path, reason = next(iter(self.misread.items()))
            msg = f"anomalib would misread {len(self.misread)} of {count} training images: {path} {reason}. "
            msg += "Run `metarefine convert DATA --to DIR` and train on its 8-bit upright copies"
            raise ValueError(msg + " (12 bits in 16: --bit-depth 12 there, bit_depth=12 in MetaRefine).")
        if self.hashes and len(self.constant) == len(self.hashes):
            msg = f"All {count} training images have a single colour. The first is {self.constant[0]}. "
            raise ValueError(msg + "Check the camera's lens cap and light.")


def read_image(path: str | Path, bit_depth: int | None = None) -> ImageFile:
    """Read and decode an image file.

    Args:
        path (str | Path): A regular file, a link to one, or an address, see `located`.
        bit_depth (int | None): Bits in use of files with more than 8, such as 12; ``None`` takes those of the file.

    Raises:
        OSError: If the file can't be opened.
        UnreadableImageError: If it is no regular file, too large, empty, damaged, no image, or of a kind whose full
            scale is not known.
        ValueError: If ``bit_depth`` is no whole number from 1 to 32.

    Example:
        >>> read_image("part.tif", bit_depth=12).pixels.max()  # doctest: +SKIP
        0.97
    """
    return decode_image(read_bytes(path), str(path), bit_depth)


def read_bytes(path: str | Path) -> bytes:
    """Content of a regular file of bounded size. Nothing else is read: a FIFO never ends, and neither does a device.

    Raises:
        OSError: If the file can't be opened.
        UnreadableImageError: If it is no regular file, or larger than `LARGEST_FILE`.
    """
    if is_remote(path):
        content = storage.content(path, LARGEST_FILE + 1)
    else:
        with open(path, "rb", opener=_open_without_waiting) as file:  # `Path.open` takes no opener
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImageError(str(path), "it is no regular file, but a device or a pipe")
            content = file.read(min(status.st_size, LARGEST_FILE) + 1)  # Python sets aside as much as is asked for
    if len(content) > LARGEST_FILE:
        raise UnreadableImageError(str(path), f"it is larger than {LARGEST_FILE / 2**20:g} MiB")
    return content


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file of any size and kind, hex, as `ImageFile.sha256` has it; raises OSError."""
    digest = hashlib.sha256()
    with storage.opened(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def decode_image(content: bytes, name: str = "The data", bit_depth: int | None = None) -> ImageFile:
    """Decode the content of an image file that messages call ``name``; see `read_image`."""
    check_bit_depth(bit_depth)
    sha256 = hashlib.sha256(content).hexdigest()
    if not content:
        raise UnreadableImageError(name, "the file is empty", sha256)
    try:
        return _decode(content, sha256, bit_depth)
    except RefusedError as error:
        raise UnreadableImageError(name, str(error), sha256) from None
    except Exception as error:  # decoders raise many kinds
        reason = " ".join(str(error).split())
        raise UnreadableImageError(name, f"{type(error).__name__}: {reason}", sha256) from error


def header_size(path: str | Path) -> tuple[int, int] | None:
    """Height and width of an upright image from its first bytes; ``None`` where there is no header to read."""
    try:
        if not is_remote(path) and not Path(path).is_file():
            return None
        with Image.open(io.BytesIO(storage.header(path)) if is_remote(path) else path) as image:
            turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow has turned a TIFF's size already
            return image.size if turned else image.size[::-1]
    except Exception:  # the decoder says what is wrong
        return None


def turned_upright(levels: np.ndarray, content: bytes) -> np.ndarray:
    """What OpenCV decoded of a file, upright: it leaves files of all formats but TIFF as they lie."""
    if content.startswith(TIFF):
        return levels
    with Image.open(io.BytesIO(content)) as image:
        return _turn(levels, _orientation(image))


def check_bit_depth(bit_depth: int | None) -> None:
    """Raise ValueError unless it is ``None`` or a whole number from 1 to 32."""
    if bit_depth is not None and (isinstance(bit_depth, bool) or bit_depth not in range(1, 33)):
        msg = f"bit_depth must be a whole number from 1 to 32, found {bit_depth!r}."
        raise ValueError(msg)


def check_images(paths: Sequence[str | Path], bit_depth: int | None = None) -> CheckedImages:
    """Decode every image once, before a training run trips over one; see `read_image`."""
    checked = CheckedImages()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for path, found in zip(map(str, paths), pool.map(lambda path: _check(path, bit_depth), paths), strict=True):
            if isinstance(found, str):
                checked.unreadable[path] = found
                continue
            sha256, misread, constant = found
            checked.hashes[path] = sha256
            if misread:
                checked.misread[path] = misread
            if constant:
                checked.constant.append(path)
    return checked


def reason_of(error: Exception) -> str:
    """Why a file can't be read, without its name."""
    return error.reason if isinstance(error, UnreadableImageError) else f"{type(error).__name__}: {error}"


def _check(path: str | Path, bit_depth: int | None) -> tuple[str, str | None, bool] | str:
    try:
        image = read_image(path, bit_depth)
    except (OSError, ValueError) as error:
        return reason_of(error)
    return image.sha256, image.misread, image.is_constant


def _open_without_waiting(path: str, flags: int) -> int:
    # To open a FIFO waits for a writer. Windows has no such flag, and no such files.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _decode(content: bytes, sha256: str, bit_depth: int | None) -> ImageFile:
    try:
        opened = Image.open(io.BytesIO(content))
    except Image.UnidentifiedImageError:
        if not content.startswith(TIFF):
            raise
        levels, white = rgb_levels(decode_deep(content), 32, bit_depth)  # no mode of Pillow is so deep
        return ImageFile(levels, white, sha256, misread="is a TIFF that Pillow can't open")
    with opened as image:
        bits = bits_per_channel(image, content)
        turned = _orientation(image) > 1
        pages = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # a camera's preview is no page
        image.load()
        left = _orientation(image)  # Pillow turns TIFF files while it loads them
        # Whether it turns them for anomalib too depends on what is read of the file before.
        misread = "is turned by its EXIF tag" if turned else None
        if bits > 8:
            left = 1 if image.format == "TIFF" else left  # so does OpenCV
            array = np.asarray(image) if image.mode in SIXTEEN_BITS else decode_deep(content)
            levels, white = rgb_levels(array, bits, bit_depth)
            grey, misread = array.ndim == 2, "has more than 8 bits per channel"
        else:
            grey, white = image.mode in ("1", "L", "LA"), 255
            rgb = _without_transparency(image)
            misread = misread or ("has transparent pixels" if rgb is not None else None)
            levels = np.asarray(rgb or image.convert("RGB"))
    return ImageFile(_turn(levels, left), white, sha256, grey, turned, pages, misread)


def _without_transparency(image: Image.Image) -> Image.Image | None:
    """The image over black; ``None`` if it is opaque."""
    if not image.has_transparency_data:
        return None
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return None
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")


def _turn(levels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](levels)) if orientation > 1 else levels


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in _UPRIGHT else 1
