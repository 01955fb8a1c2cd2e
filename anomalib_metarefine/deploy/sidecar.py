"""``metadata.json`` beside an exported model: what the computer on the line needs to know about it.

anomalib 2 exports a graph and nothing else. Thresholds, input size and versions, and any proof that the files on the
line are the files that were exported, are gone (upstream issue 2620 and pull request 3570). The schema is in
``docs/deployment.md``. Nothing here needs torch or anomalib.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_metarefine.images.reading import file_hash

if TYPE_CHECKING:
    from collections.abc import Callable

SIDECAR = "metadata.json"
SCHEMA = 1
_MISSING = object()


@dataclass
class Sidecar:
    """Metadata of an exported model; the attributes are the top level of ``metadata.json``.

    Attributes:
        model (dict[str, Any]): Its name, format (``"openvino"``, ``"onnx"``, ``"torch"``) and precision.
        files (dict[str, str]): SHA-256 of every model file, by name.
        input (dict[str, Any]): Name, layout, colour order, value range and size of the input.
        image_score (dict[str, float]): Raw threshold, and the raw minimum and maximum that normalise the score.
        anomaly_map (dict[str, float]): The same for the patch scores.
        calibration (dict[str, Any] | None): How the threshold was chosen from normal images, if it was.
        training (dict[str, Any]): Images, kept images, hashes of data and manifest, seed.
        versions (dict[str, str | None]): Of the packages that had a part in it.
        schema (int): Version of this layout.
    """

    model: dict[str, Any]
    files: dict[str, str]
    input: dict[str, Any]
    image_score: dict[str, float]
    anomaly_map: dict[str, float]
    calibration: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    schema: int = SCHEMA

    def raw_score(self, normalized: float) -> float:
        """The raw image score behind a normalised one.

        Args:
            normalized (float): In [0, 1]. At the ends the raw score may lie further out: the graph clamps there.

        Returns:
            float: In bits per dimension.
        """
        scale = self.image_score["maximum"] - self.image_score["minimum"]
        return (normalized - 0.5) * scale + self.image_score["threshold"]


def write_sidecar(folder: Path, sidecar: Sidecar) -> Path:
    """Write ``metadata.json`` into the folder of the model files, and return its path."""
    path = folder / SIDECAR
    # A NaN threshold (a model that was never validated) is no JSON; null says the same.
    path.write_text(json.dumps(_without_nan(asdict(sidecar)), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_sidecar(folder: Path | str) -> Sidecar:
    """Read ``metadata.json``.

    Args:
        folder (Path | str): Folder of an exported model.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If it can't be read, or is of a later schema than this package knows.
    """
    path = Path(folder) / SIDECAR
    if not path.is_file():
        msg = f"{path} is missing. `anomalib export --model MetaRefine` writes it beside the model; copy it along."
        raise FileNotFoundError(msg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is not the metadata of an exported model ({error!r}). Export the model again."
        raise ValueError(msg) from error
    if not _is_whole(schema):
        msg = f"{path} must hold a whole number as schema, found {schema!r}. Export the model again."
        raise ValueError(msg)
    if schema > SCHEMA:
        msg = f"{path} has schema {schema}, but this version of anomalib-metarefine knows up to {SCHEMA}. Update it."
        raise ValueError(msg)
    for name, (is_right, expected) in _EXPECTED.items():
        found = _at(content, name)
        if found is not _MISSING and not is_right(found):
            msg = f"{path} must hold {expected} as {name}, found {str(found)[:80]!r}. Export the model again."
            raise ValueError(msg)
    names = {entry.name for entry in fields(Sidecar)}
    try:
        return Sidecar(**{name: value for name, value in content.items() if name in names})
    except TypeError as error:
        msg = f"{path} lacks an entry ({error}). Export the model again."
        raise ValueError(msg) from error


def verify_files(folder: Path | str, sidecar: Sidecar) -> None:
    """Compare the model files with their recorded SHA-256.

    Raises:
        ValueError: If a file is missing or differs.
    """
    for name, expected in sidecar.files.items():
        path = Path(folder) / name
        found = file_hash(path) if path.is_file() else "no file"
        if found != expected:
            msg = f"{path} is not the file that was exported: SHA-256 is {found}, expected {expected}. Copy it again."
            raise ValueError(msg)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int = 0, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_block(value: object) -> bool:
    return isinstance(value, dict)


def _is_scale(value: object) -> bool:
    return isinstance(value, dict) and all(number is None or _is_number(number) for number in value.values())


def _are_hashes(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_sides(value: object) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 2 and all(_is_whole(side, 1) for side in value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_band(value: object) -> bool:
    return isinstance(value, dict) and _is_number(value.get("lower")) and _is_number(value.get("upper"))


# What is read of the file, by its place; anything else in it is for people.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_block, "a block"),
    "model.format": (lambda value: isinstance(value, str), "a text"),
    "files": (_are_hashes, "texts by file name"),
    "input": (_is_block, "a block"),
    "input.accepts": (lambda value: value == "any" or (_are_sides(value) and len(value) == 2), '"any" or [h, w]'),
    "input.size": (lambda value: value is None or _are_sides(value), "one or two sides or null"),
    "input.antialias": (lambda value: isinstance(value, bool), "true or false"),
    "input.bit_depth": (lambda value: value is None or _is_whole(value, 1, 32), "1 to 32 or null"),
    "image_score": (_is_scale, "numbers or null"),
    "anomaly_map": (_is_scale, "numbers or null"),
    "calibration": (lambda value: value is None or _is_block(value), "a block or null"),
    "calibration.images": (_is_whole, "a whole number"),
    "calibration.set_aside": (_is_whole, "a whole number"),
    "calibration.quantiles": (_are_numbers, "numbers"),
    "calibration.uncertain": (lambda value: value is None or _is_band(value), "numbers lower and upper or null"),
    "training": (_is_block, "a block"),
    "versions": (_is_block, "a block"),
}


def _at(content: Any, place: str) -> Any:  # noqa: ANN401
    for name in place.split("."):
        if not isinstance(content, dict) or name not in content:
            return _MISSING
        content = content[name]
    return content


def _without_nan(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value  # noqa: PLR0124
