"""Requests and answers of the Open Inference Protocol (KServe v2) over HTTP, with its extension for binary tensors.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_metarefine.images.reading import ImageFile

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADER_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON; what follows are tensors
INPUT = "input"
_MOST_IMAGES = 64  # in a request
_TYPES = {np.dtype("<f4"): "FP32", np.dtype("<f8"): "FP64", np.dtype("?"): "BOOL"}


@dataclass(frozen=True)
class Query:
    """What is asked.

    Attributes:
        images (list[bytes | np.ndarray]): Image files, or pixels ``[H, W, 3]`` float32 in [0, 1], RGB.
        outputs (dict[str, bool]): Tensors that are wanted, and whether as binary; empty for the usual ones.
        binary (bool): Whether the usual ones are wanted as binary.
        id (str | None): To be given back.
    """

    images: list[bytes | np.ndarray]
    outputs: dict[str, bool]
    binary: bool
    id: str | None


def read_query(body: bytes, header_length: str | None) -> Query:
    """Read a request; raises ValueError with a sentence for the client.

    Args:
        body (bytes): Of the request.
        header_length (str | None): The header `HEADER_LENGTH`, if there is one.
    """
    if header_length is not None and not (header_length.isdecimal() and int(header_length) <= len(body)):
        msg = f"{HEADER_LENGTH} is {header_length}, but the request has {len(body)} bytes"
        raise ValueError(msg)
    length = len(body) if header_length is None else int(header_length)
    try:
        header = json.loads(body[:length])
        (tensor,) = header["inputs"]
        name, datatype, shape = tensor["name"], tensor["datatype"], [int(side) for side in tensor["shape"]]
        outputs = {one["name"]: bool(one.get("parameters", {}).get("binary_data")) for one in header.get("outputs", ())}
        size = tensor.get("parameters", {}).get("binary_data_size")
        binary = bool(header.get("parameters", {}).get("binary_data_output"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        msg = "expected JSON with one tensor of name, datatype and shape under inputs"
        raise ValueError(f"{msg}: {type(error).__name__}: {error}") from error
    if name != INPUT:
        msg = f"the model's input is called {INPUT}, found {name}"
        raise ValueError(msg)
    content = body[length:] if size is not None else tensor.get("data")
    if content is None or (size is not None and size != len(content)):
        msg = f"the tensor has no data, or not the {size} bytes that binary_data_size says"
        raise ValueError(msg)
    return Query(_images(datatype, shape, content), outputs, binary, header.get("id"))


def write_answer(
    head: dict[str, Any], outputs: Mapping[str, np.ndarray], binary: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """Body of an answer, and the length of its JSON if tensors follow.

    Args:
        head (dict[str, Any]): What stands beside the outputs.
        outputs (Mapping[str, np.ndarray]): Tensors; those of text are written as BYTES.
        binary (Mapping[str, bool]): Whether each is written as binary.
    """
    described, blobs = [], []
    for name, values in outputs.items():
        kind = _TYPES.get(values.dtype, "BYTES")
        entry: dict[str, Any] = {"name": name, "datatype": kind, "shape": list(values.shape)}
        if binary[name]:
            blobs.append(values.tobytes() if values.dtype in _TYPES else _with_lengths(values))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        described.append(entry)
    header = json.dumps({**head, "outputs": described}, allow_nan=False).encode()
    return b"".join([header, *blobs]), len(header) if blobs else None


def _images(datatype: str, shape: list[int], content: bytes | Any) -> list[bytes | np.ndarray]:  # noqa: ANN401
    count = shape[0] if shape else 0
    if not 1 <= count <= _MOST_IMAGES:
        msg = f"expected 1 to {_MOST_IMAGES} images, the first side of the shape, found {shape}"
        raise ValueError(msg)
    if datatype == "BYTES" and shape in ([count], [count, 1]):
        files = _without_lengths(content) if isinstance(content, bytes) else _from_base64(content)
        if len(files) != count:
            msg = f"the shape says {count} image files, found {len(files)}"
            raise ValueError(msg)
        return files
    if datatype == "UINT8" and len(shape) == 4 and shape[3] == 3:
        levels = _array(content, np.dtype(np.uint8), shape)
        return [ImageFile(image, 255.0, "").pixels for image in levels]
    if datatype == "FP32" and len(shape) == 4 and shape[1] == 3:
        values = _array(content, np.dtype("<f4"), shape)
        if not (values.min() >= 0 and values.max() <= 1):  # false for NaN too
            msg = f"FP32 pixels must lie in [0, 1], found {values.min():g} to {values.max():g}"
            raise ValueError(msg)
        return [np.ascontiguousarray(image.transpose(1, 2, 0), dtype=np.float32) for image in values]
    msg = "expected FP32 [N, 3, H, W] in [0, 1], UINT8 [N, H, W, 3], or BYTES [N] (image files, base64 in JSON), all "
    raise ValueError(f"{msg}RGB; found {datatype} {shape}")


def _array(content: bytes | Any, dtype: np.dtype, shape: list[int]) -> np.ndarray:  # noqa: ANN401
    values = np.frombuffer(content, dtype) if isinstance(content, bytes) else np.asarray(content)
    if min(shape) < 1 or values.size != math.prod(shape):
        msg = f"an image of the shape {shape} needs {math.prod(shape)} values, at least one; found {values.size}"
        raise ValueError(msg)
    whole = dtype.kind == "u"
    if values.dtype.kind not in ("iu" if whole else "iuf") or (whole and not 0 <= values.min() <= values.max() <= 255):
        msg = f"the data are no numbers of {dtype.name}: {values.ravel()[:3].tolist()}, ..."
        raise ValueError(msg)
    return values.astype(dtype, copy=False).reshape(shape)


def _from_base64(texts: Any) -> list[bytes | np.ndarray]:  # noqa: ANN401
    try:
        return [base64.b64decode(text, validate=True) for text in np.asarray(texts, dtype=object).ravel()]
    except (TypeError, ValueError, binascii.Error) as error:
        msg = f"an image file in JSON must be text in base64: {error}"
        raise ValueError(msg) from error


def _without_lengths(content: bytes) -> list[bytes | np.ndarray]:
    files: list[bytes | np.ndarray] = []
    start = 0
    while start < len(content):
        size = int.from_bytes(content[start : start + 4], "little")
        files.append(content[start + 4 : start + 4 + size])
        start += 4 + size
    if start != len(content):
        msg = "BYTES: the lengths before the image files don't add up to the length of the data"
        raise ValueError(msg)
    return files


def _with_lengths(texts: np.ndarray) -> bytes:
    encoded = [text.encode() for text in texts.ravel().tolist()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
