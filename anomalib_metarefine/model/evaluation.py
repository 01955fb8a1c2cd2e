"""What a threshold finds where images are labelled: by the folders they lie in, or by a column of a table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.images.sources import absolute, read_source, read_table

if TYPE_CHECKING:
    from collections.abc import Sequence

NORMAL_FOLDERS = ("good", "normal", "ok")  # in a tree that has one of these, all other folders hold defective images
_MASKS = "ground_truth"  # where data sets in MVTec layout keep their masks, which are no images of parts
_NORMAL, _DEFECTIVE = ("0", "normal", "good", "ok"), ("1", "abnormal", "anomalous", "defective", "bad")
_RATES = (0.01, 0.02, 0.05, 0.1)


class LabelledImages(NamedTuple):
    """Images, and what is known about them."""

    paths: list[Path]  # the images
    anomalous: np.ndarray | None  # [N] bool; None where they are not labelled


def read_labelled(data: str | Path) -> LabelledImages:
    """The images of a folder or table, without masks, and their labels.

    Args:
        data (str | Path): See `read_source`. A table labels images in a column ``label_index`` (0, 1) or ``label``.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If the table has labels that can't be understood, or `read_source` can't read it.
    """
    source = read_source(data)
    paths = [path for path in source.paths if _MASKS not in path.relative_to(source.root).parts]
    if not paths:
        msg = f"All {len(source.paths)} images in {data} are masks: they lie in folders named {_MASKS}."
        raise FileNotFoundError(msg)
    if Path(data).suffix.lower() in (".csv", ".parquet"):
        return LabelledImages(paths, _table_labels(Path(data), source.root, paths))
    return LabelledImages(paths, folder_labels(paths))


def folder_labels(paths: Sequence[str | Path]) -> np.ndarray | None:
    """Labels by the folders that images lie in, below the one they have in common.

    Returns:
        np.ndarray | None: ``[N]``, whether an image is defective; ``None`` if no folder is named ``good``, ``normal``
            or ``ok``, or some images lie outside of the others' folders.
    """
    listed = [absolute(path) for path in paths]
    root = Path(os.path.commonpath([path.parent for path in listed]))
    folders = [path.relative_to(root).parts[:-1] for path in listed]
    if not any(folders):
        folders = [(root.name,)] * len(listed)
    normal = np.array([any(name.lower() in NORMAL_FOLDERS for name in names) for names in folders])
    return ~normal if normal.any() and all(folders) else None


def _table_labels(file: Path, root: Path, paths: Sequence[Path]) -> np.ndarray | None:
    table = read_table(file)
    column = next((name for name in ("label_index", "label") if name in table), None)
    if column is None:
        return None
    known = {}
    for path, label in zip(table.image_path, table[column], strict=True):
        word = str(label).strip().lower().removesuffix(".0")
        if word not in _NORMAL + _DEFECTIVE:
            msg = f"{file} has the {column} {label!r} for {path}. Expected one of {', '.join(_NORMAL + _DEFECTIVE)}."
            raise ValueError(msg)
        known[absolute(root / path)] = known[absolute(file.parent / path)] = word in _DEFECTIVE
    return np.array([known[path] for path in paths]) if all(path in known for path in paths) else None


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold on labelled images."""

    threshold: float  # raw; images above it are called anomalous
    false_alarms: int  # normal images above it
    found: int  # defective images above it


@dataclass(frozen=True)
class Detection:
    """What a model finds among labelled images."""

    normal: int  # normal images
    defective: int  # defective images
    auroc: float | None  # image AUROC; None if one of the two is missing
    chosen: OperatingPoint  # the model's threshold
    # the lowest threshold that calls at most this share of these normal images anomalous
    at_rates: dict[float, OperatingPoint]

    @property
    def finds_nothing(self) -> bool:
        """Whether there are defective images, and none is found."""
        return self.defective > 0 and self.chosen.found == 0

    def lines(self) -> list[str]:
        """The figures for a person, as lines of text."""
        chosen = self.chosen
        alarms = f"{chosen.false_alarms} of {self.normal} normal images called anomalous" if self.normal else ""
        found = f"{chosen.found} of {self.defective} defective images found" if self.defective else ""
        lines = [f"At the threshold {chosen.threshold:.4g}: {', '.join(part for part in (found, alarms) if part)}."]
        if self.auroc is not None:
            lines.append(f"Image AUROC {self.auroc:.4f}. At other thresholds, counted on these very images:")
            lines.append("  at most   threshold   false alarms   defects found")
            lines += [
                f"  {rate:7.0%}   {at.threshold:9.4g}   {at.false_alarms:12d}   {at.found / self.defective:13.0%}"
                for rate, at in self.at_rates.items()
            ]
        if self.finds_nothing:
            lines.append(f"WARNING: NOT ONE OF {self.defective} DEFECTIVE IMAGES IS FOUND AT THIS THRESHOLD.")
            lines.append(
                "Defective images among those that the model was trained or calibrated on may have raised it: look "
                "through them (metarefine curate). Else allow more false alarms (--false-alarm-rate), train with "
                "larger images, or choose another backbone. An AUROC near 0.5 says that no threshold will help."
            )
        return lines


def detect(scores: np.ndarray, anomalous: np.ndarray, threshold: float) -> Detection:
    """Count false alarms and defects found.

    Args:
        scores (np.ndarray): ``[N]``, raw.
        anomalous (np.ndarray): ``[N]`` bool.
        threshold (float): Raw.

    Example:
        >>> found = detect(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, False, True, True]), 3.5)
        >>> found.chosen.found, found.chosen.false_alarms, found.auroc, found.at_rates[0.01].found
        (1, 0, 1.0, 2)
    """
    normal, defective = np.sort(scores[~anomalous]), scores[anomalous]

    def point(at: float) -> OperatingPoint:
        return OperatingPoint(float(at), int((normal > at).sum()), int((defective > at).sum()))

    both = len(normal) > 0 and len(defective) > 0
    at_rates = {rate: point(normal[len(normal) - 1 - int(rate * len(normal))]) for rate in _RATES} if both else {}
    auroc = float(roc_auc_score(anomalous, scores)) if both else None
    return Detection(len(normal), len(defective), auroc, point(threshold), at_rates)
