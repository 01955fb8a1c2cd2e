"""Pixels deeper than 8 bits per channel: which files have them, and what their levels mean.

Pillow cuts 16-bit RGB down to 8 bits and knows no floating point in colour, so OpenCV decodes these files.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

TIFF = (b"II*\0", b"MM\0*")  # how such a file begins
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow; the one deep kind that it decodes whole

_PNG = b"\x89PNG\r\n\x1a\n"
_BITS, _PHOTOMETRIC, _PLANES, _EXTRA, _SAMPLE_FORMAT = 258, 262, 284, 338, 339  # TIFF tags


class RefusedError(ValueError):
    """A file that is whole, but whose levels mean nothing without a person's word."""


def bits_per_channel(image: Image.Image, content: bytes) -> int:
    """Bits per channel; Pillow's mode does not tell, as it cuts 16-bit RGB down to 8."""
    if content.startswith(_PNG):
        return content[24]
    if image.format == "TIFF":
        return _tiff_bits(image.tag_v2)  # type: ignore[attr-defined]  # every TIFF of Pillow has it
    return 16 if image.mode == "F" or image.mode.startswith("I") else 8


def _tiff_bits(tags: Mapping[int, Any]) -> int:
    bits = max(tags.get(_BITS, (1,)))
    signed = {1, *tags.get(_SAMPLE_FORMAT, (1,))} - {1}
    odd = "neither grey nor RGB" if tags.get(_PHOTOMETRIC) not in (1, 2) else None
    if len(tags.get(_BITS, ())) > 1 and tags.get(_PLANES) == 2:
        odd = "stored plane by plane"  # OpenCV takes the planes for pixels
    if 1 in tags.get(_EXTRA, ()):
        odd = "multiplied by its transparency"
    if bits > 8 and odd:
        msg = f"{bits} bits per channel in a TIFF that is {odd}. Save it as 16-bit grey or RGB"
        raise RefusedError(msg)
    return max(bits, 9) if signed else bits


def decode_deep(content: bytes) -> np.ndarray:
    """``[H x W]`` or ``[H x W x 3 or 4]``, RGB, of whatever type the file has; TIFF files come upright."""
    if content.startswith(TIFF):
        stream = io.BytesIO(content)
        tags = ImageFileDirectory_v2(stream.read(8))
        stream.seek(tags.next)
        tags.load(stream)
        _tiff_bits(tags)  # Pillow need not have opened it
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        msg = "neither Pillow nor OpenCV can decode it. Save it as 8- or 16-bit PNG"
        raise RefusedError(msg)
    if array.ndim == 2:
        return array
    return cv2.cvtColor(array, cv2.COLOR_BGR2RGB if array.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)


def rgb_levels(array: np.ndarray, bits: int, bit_depth: int | None) -> tuple[np.ndarray, float]:
    """RGB levels ``[H x W x 3]`` and the level of white, of an image deeper than 8 bits."""
    if array.dtype == np.uint8:
        msg = "OpenCV decodes only 8 bits of it. Save it as 16-bit grey or RGB"
        raise RefusedError(msg)
    least, most = array.min(), array.max()
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and least >= 0 and most <= 1):
            msg = f"floating-point levels from {least:g} to {most:g}, expected [0, 1]. Divide them by their full scale"
            raise RefusedError(msg)
        levels, white = array.astype(np.float32), 1.0
    else:
        if bit_depth is None and (bits > 16 or array.dtype.kind == "i"):
            msg = f"levels of type {array.dtype}, whose full scale is not known. Pass the bit depth (--bit-depth 12)"
            raise RefusedError(msg)
        white = 2.0 ** (bit_depth or bits) - 1
        if least < 0 or most > white:
            msg = f"levels from {least} to {most}, but {bit_depth or bits} bits hold 0 to {white:.0f}. "
            raise RefusedError(msg + "Pass the bit depth of the camera")
        levels = array.astype(np.uint16 if white < 2**16 else np.float64)
    if levels.ndim == 2:
        return np.repeat(levels[..., None], 3, axis=2), white
    if levels.shape[2] == 4:  # opaque is the highest level of the type, whatever bits the camera uses
        full = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1.0
        levels = (levels[..., :3] * (array[..., 3:] / full)).astype(levels.dtype)
    return levels, white
