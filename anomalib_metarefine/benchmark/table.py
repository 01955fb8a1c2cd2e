"""A results table that grows by one row at a time and survives being interrupted."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = ["data", "image_size", "train_images", "contamination", "seed", "model", "settings", "training"]


@dataclass(frozen=True)
class Row:
    """One training and its test.

    Attributes:
        data (str): Name of the data set.
        image_size (str): ``"HxW"``.
        train_images (int): Size of the raw training set.
        contamination (float): Share of dirty images in it.
        seed (int): Of the draw of images, of the curation and of the training.
        model (str): Name of the model.
        settings (str): What differs from anomalib's defaults.
        training (str): ``"raw"``, ``"curated"`` or ``"clean"``.
        image_AUROC (float): On the test set, which is the same for all three.
        kept (int): Images trained on.
        rejected (int): Images left out.
        precision (float): Dirty share of what was left out; NaN if nothing was.
        recall (float): Share of the dirty images that was left out; NaN if there are none.
        seconds (float): Of fitting the model, on features that may be kept from an earlier training.
        curation_seconds (float): Of the curation; NaN for the other trainings.
        test_normal (int): Good images of the test set.
        test_abnormal (int): Defective images of the test set.
        versions (str): Of what ran.
    """

    data: str
    image_size: str
    train_images: int
    contamination: float
    seed: int
    model: str
    settings: str
    training: str
    image_AUROC: float  # noqa: N815 (anomalib's name of the metric)
    kept: int
    rejected: int
    precision: float
    recall: float
    seconds: float
    curation_seconds: float
    test_normal: int
    test_abnormal: int
    versions: str


COLUMNS = [field.name for field in fields(Row)]


class ResultTable:
    """A CSV file of `Row`.

    A row is appended in one write, so that processes which work on different data sets may share the file, and a row
    cut short by a crash is dropped when the file is opened again.

    Args:
        path (str | Path): The file; its folder must exist.

    Raises:
        ValueError: If the file is a table of something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("x", newline="") as file:
                file.write(_line(COLUMNS))
        except FileExistsError:
            self._drop_unfinished()
        found = pd.read_csv(self.path, nrows=0).columns.tolist()
        if found != COLUMNS:
            msg = f"{self.path} has the columns {found}, expected {COLUMNS}. Pass another --out, or move the file away."
            raise ValueError(msg)

    def read(self) -> pd.DataFrame:
        """All rows; of rows with one key the last."""
        rows = pd.read_csv(self.path, keep_default_na=False, na_values={c: ["nan", ""] for c in _floats()})
        return rows.drop_duplicates(KEY, keep="last").reset_index(drop=True)

    def find(self, key: Mapping[str, object]) -> pd.Series | None:
        """The row of a key (a value for each of `KEY`), ``None`` if there is none yet."""
        rows = self.read()
        rows = rows[(rows[list(key)] == list(key.values())).all(axis=1)]
        return None if rows.empty else rows.iloc[-1]

    def append(self, row: Row) -> None:
        """Add a row."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, _line(asdict(row).values()).encode())
        finally:
            os.close(handle)

    def _drop_unfinished(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def _floats() -> list[str]:
    return [field.name for field in fields(Row) if field.type == "float"]


def _line(values: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
