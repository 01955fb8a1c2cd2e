"""The results file as an outbox: what of it a receiver has not got yet.

A receiver's place is kept in a small file beside the results, so nothing has to be kept in memory, and nothing is
copied. It is written when lines have arrived: after a kill some are sent again, none is left out. What is sent are the
lines with an ``id``, also those that stand ``again``; the others are the memory of `watch` itself.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from anomalib_metarefine.deploy.journal import encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BATCH = 100  # lines
_HAS_ID = b'"id": "'  # in a line of JSON no value can look like this: its quotes would be escaped
_LONGEST = 1 << 16  # bytes, of a file's first line


class Place(NamedTuple):
    """Up to where lines have arrived.

    Attributes:
        file (str): Hash of the first line of the results file, which may have another name by now.
        offset (int): Bytes.
    """

    file: str
    offset: int


class Outbox:
    """The lines of the results that one receiver has not got yet, through renamed files (log rotation) as well.

    Args:
        results (Path): The file. It must not be written to before this is made: what is missing at its end was lost.
        name (str): Of the receiver; its place is kept in ``results.name``.

    Attributes:
        missing (set[str]): Hashes of renamed results that should have been gone on with, and are nowhere beside them.
        damaged (bool): The file of the place can't be read: everything is sent again.
    """

    def __init__(self, results: Path, name: str) -> None:
        self._results, self._file = results, results.with_name(f"{results.name}.{name}")
        self.missing: set[str] = set()
        self.damaged = False
        self._place = self._saved()
        size = results.stat().st_size
        if self._place and self._place.offset > size and self._place.file == first_hash(results):
            self.arrived(self._place._replace(offset=size))  # lines of before a power failure, which will come again

    def begin(self) -> None:
        """A receiver that has no place yet gets the file from its beginning, which must be there by now."""
        if self._place is None:
            self.arrived(Place(first_hash(self._results), 0))

    def batch(self) -> tuple[list[bytes], Place | None]:
        """The next lines, about a hundred, and the place behind them."""
        lines: list[bytes] = []
        place = None
        for line, behind in self._pending():
            record, place = _parsed(line) or {}, behind
            lines += map(encode, record["lines"]) if record.get("event") == "again" else [line] if record else []
            if len(lines) >= _BATCH:
                break
        return lines, place

    def arrived(self, place: Place) -> None:
        """Write down the place."""
        part = self._file.with_name(f".{self._file.name}.part")
        part.write_text(json.dumps(place._asdict()), encoding="ascii")
        part.replace(self._file)
        self._place = place

    def waiting(self) -> int:
        """How many lines there are to send."""
        return sum(1 for _ in self._pending())

    def _pending(self) -> Iterator[tuple[bytes, Place]]:
        place = self._place
        while place is not None:
            following = self._following(place.file)  # first: once there is one, nothing is added to this file
            lines = self._open(place.file)
            if lines is None:
                self.missing.add(place.file)
            else:
                with lines:
                    lines.seek(place.offset)
                    for line in lines:
                        if not line.endswith(b"\n"):  # it is just being written
                            break
                        place = Place(place.file, place.offset + len(line))
                        if _HAS_ID in line:
                            yield line, place
            place = Place(following, 0) if following else None

    def _following(self, file: str) -> str | None:
        """The results that were begun when these were renamed; ``None`` while these are written to."""
        current, previous = _beginning_of(self._results)
        if current in ("", file):
            return None
        for one, before in ((current, previous), *map(_beginning_of, self._others())):
            if before == file:
                return one
        if previous is not None:
            self.missing.add(previous)
        return current

    def _open(self, file: str) -> BinaryIO | None:
        for path in (self._results, *self._others()):
            try:
                lines = path.open("rb")
            except OSError:
                continue
            if _beginning(lines)[0] == file:
                return lines
            lines.close()
        return None

    def _others(self) -> Iterator[Path]:
        """Files that may be earlier results."""
        for path in self._results.parent.iterdir():
            alike = path.name.startswith(self._results.stem) or path.suffix == self._results.suffix
            if alike and path != self._results and path.is_file():
                yield path

    def _saved(self) -> Place | None:
        try:
            saved = json.loads(self._file.read_bytes())
            return Place(str(saved["file"]), int(saved["offset"]))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            self.damaged = True
            return None


def first_hash(results: Path) -> str:
    """What results are known by, whatever their name is; empty while they have no line."""
    return _beginning_of(results)[0]


def _beginning_of(path: Path) -> tuple[str, str | None]:
    try:
        with path.open("rb") as lines:
            return _beginning(lines)
    except OSError:
        return "", None


def _beginning(lines: BinaryIO) -> tuple[str, str | None]:
    """The hash of the first line, and that of the results before these."""
    first = lines.readline(_LONGEST)
    name = hashlib.sha256(first).hexdigest()[:32] if first.endswith(b"\n") else ""
    return name, (_parsed(first) or {}).get("previous")


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
