"""The result file of the benchmark: it grows by one row at a time and survives being interrupted."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

NAN = float("nan")
TRAININGS = ("raw", "curated", "repaired", "clean")


@dataclass(frozen=True)
class Key:
    """What a row is found by."""

    data: str
    category: str  # empty if it has none
    image_size: str  # "HxW" in pixels
    train_images: int  # asked for; 0: all that the data set has
    backbone: str
    protocol: str  # see `Contaminated`
    overlap: str  # see `Contaminated`
    contamination: float
    seed: int  # of the draw of images, of the curation and of the training
    model: str  # as the configuration names it
    settings: str  # its class and what differs from the class's defaults, as JSON
    training: str  # one of `TRAININGS`


@dataclass(frozen=True)
class Row(Key):
    """One training and its test: what it is found by, and what was found.

    Figures that do not apply are NaN: pixel figures without masks, all of them where ``reason`` is given.
    ``docs/reference/bench.md`` says what the columns are.
    """

    image_AUROC: float = NAN  # noqa: N815 (anomalib's names of the metrics)
    image_AUPR: float = NAN  # noqa: N815
    image_F1Max: float = NAN  # noqa: N815
    pixel_AUROC: float = NAN  # noqa: N815
    pixel_AUPR: float = NAN  # noqa: N815
    pixel_AUPRO: float = NAN  # noqa: N815
    pixel_AUPIMO: float = NAN  # noqa: N815
    pixel_F1Max: float = NAN  # noqa: N815
    kept: int = 0  # images that the finished model learned from
    rejected: int = 0  # left out, by the curation, by the truth, or by the model itself
    precision: float = NAN  # dirty share of what was left out
    recall: float = NAN  # share of the dirty images that was left out
    fit_seconds: float = NAN  # on features that the cells of a data set share
    feature_seconds: float = NAN  # of one pass of the backbone over the images trained on
    curation_seconds: float = NAN  # repair included; NaN for raw and clean
    test_seconds: float = NAN  # on shared features, metrics included
    images_per_second: float = NAN  # predicted one at a time, backbone included
    peak_memory_mb: float = NAN  # growth of the process's peak while fitting and predicting single images
    model_mb: float = NAN  # parameters and buffers
    test_normal: int = 0
    test_abnormal: int = 0
    reason: str = ""  # why this cell could not be run; empty if it was
    versions: str = ""
    machine: str = ""
    jobs: int = 1  # processes that shared the machine
    date: str = ""  # when it ended, UTC

    @property
    def key(self) -> Key:
        """What this row is found by."""
        return Key(*(getattr(self, name) for name in KEY))


KEY = [field.name for field in fields(Key)]
COLUMNS = [field.name for field in fields(Row)]
_TYPES = {field.name: {"str": str, "int": int, "float": float}[field.type] for field in fields(Row)}


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
            _drop_unfinished(self.path)
        with self.path.open(newline="") as file:
            rows = csv.reader(file)
            found = next(rows, [])
            if found != COLUMNS:
                msg = (
                    f"{self.path} has the columns {found}, expected {COLUMNS}. Pass another --out, or move the file "
                    "away."
                )
                raise ValueError(msg)
            self._rows = {row.key: row for row in map(_parse, rows)}

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: Key) -> Row | None:
        """The last row of a key; ``None`` if there was none when the file was opened or appended to by this object."""
        return self._rows.get(key)

    def append(self, row: Row) -> None:
        """Add a row."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, _line(asdict(row).values()).encode())
        finally:
            os.close(handle)
        self._rows[row.key] = row


def label(data: str, category: str) -> str:
    """A data set or its category, as messages, tables and figures name it."""
    return f"{data}/{category}" if category not in {"", data} else data


def read_results(*paths: str | Path) -> pd.DataFrame:
    """All rows of some result files; of rows with one key the last.

    Args:
        *paths (str | Path): Files of `ResultTable`. They are read only.

    Returns:
        pd.DataFrame: The columns of `Row`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is a table of something else.
    """
    import pandas as pd

    missing = [str(path) for path in paths if not Path(path).is_file()]
    if missing:
        msg = f"There is no result file {', '.join(missing)}. `metarefine bench CONFIG --out FILE` makes one."
        raise FileNotFoundError(msg)
    floats = [name for name, kind in _TYPES.items() if kind is float]
    tables = []
    for path in paths:
        table = pd.read_csv(path, keep_default_na=False, na_values={name: ["nan", ""] for name in floats})
        if table.columns.tolist() != COLUMNS:
            msg = f"{path} has the columns {table.columns.tolist()}, expected {COLUMNS}: it is no benchmark result."
            raise ValueError(msg)
        tables.append(table.astype(_TYPES))
    return pd.concat(tables, ignore_index=True).drop_duplicates(KEY, keep="last").reset_index(drop=True)


def _parse(values: list[str]) -> Row:
    return Row(**{name: _TYPES[name](value) for name, value in zip(COLUMNS, values, strict=True)})


def _drop_unfinished(path: Path) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _line(values: object) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
