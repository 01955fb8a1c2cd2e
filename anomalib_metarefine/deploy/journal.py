"""The results file of `metarefine watch`: JSON lines, and the memory of what is done.

There is no second file that could disagree with it. What survives:

- the process is killed (``kill -9``): every line that was written. A line goes to the system in one call, unbuffered;
- the power fails: every line up to the last `sync`, at most about a second before. Images whose lines are lost are
  processed again, so in the file they stand once;
- a torn last line, by either, or by a full disk: it is cut off at the next start;
- the file is renamed or emptied, as log rotation does: a new one is begun. If it is removed, that is an error.
  A line that is written between copying and emptying is in neither file, so the last minute's stand once more in the
  new one.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYNC_S = 1.0  # seconds of results that a power failure may cost; once a second costs no throughput
_BLOCK = 1 << 16  # bytes
_FIRST = b'{"event"'  # what every results file begins with
_COPYING_S = 60.0  # seconds that log rotation may take from copying the file to emptying it


class ResultsRemovedError(RuntimeError):
    """The results file is gone, and with it all that was written."""


class Results(Protocol):
    """Where lines go."""

    def renewed(self) -> bool: ...  # noqa: D102
    def append(self, *records: dict[str, Any]) -> None: ...  # noqa: D102
    def sync(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Journal:
    """A file of JSON lines that one process at a time appends to.

    Args:
        path (Path): Made if it isn't there, with its folder. Beside it lies an empty ``.lock`` file.

    Attributes:
        cut (int): Bytes of a torn last line that were cut off.
        damaged (int): Lines that are no JSON, found so far by `records`.

    Raises:
        ValueError: If another process has it, or if the file is not of JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        real = path.resolve()  # through a link it is the same file, and must be the same lock
        self._lock = _lock(real.with_name(f"{real.name}.lock"), path)
        self._synced, self._dirty, self.damaged = time.monotonic(), False, 0
        self._recent: deque[tuple[float, dict[str, Any]]] = deque()
        self._again: list[dict[str, Any]] = []
        self._size, self._overtaken = 0, False  # overtaken: emptied between our look at it and our line
        self._file = path.open("a+b", buffering=0)
        try:
            self.cut = self._go_on()
        except ValueError:
            self.close()
            raise

    def renewed(self) -> bool:
        """Whether a new file had to be begun, as the old one was renamed or emptied. To be asked before each `append`.

        Raises:
            ResultsRemovedError: If there is no such file any more, under whatever name.
            ValueError: If another file has taken its place that is not of JSON lines.
        """
        ours, there = os.fstat(self._file.fileno()), _stat(self.path)
        same = there is not None and os.path.samestat(ours, there)
        if same and ours.st_size >= self._size and not self._overtaken:
            return False
        if there is None and ours.st_nlink == 0:
            msg = f"{self.path} was removed while results were written. What was in it is lost; start again to process "
            msg += "the images that are still there, and rename results that you want out of the way."
            raise ResultsRemovedError(msg)
        self.sync()
        if same:
            self._again = [record for when, record in self._recent if when > time.monotonic() - _COPYING_S]
        if self._overtaken:
            self._file.truncate(0)  # of our own lines, which would stand before the `start`; `_again` has them
        self._file.close()
        self._file = self.path.open("a+b", buffering=0)
        self._go_on()
        self._overtaken = False
        return True

    def records(self) -> Iterator[dict[str, Any]]:
        """Read all lines, one at a time; what is no JSON object (zeros after a power failure) is skipped."""
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if isinstance(record, dict):
                    yield record
                else:
                    self.damaged += 1

    def append(self, *records: dict[str, Any]) -> None:
        """Write records, in one call to the system; to disk if the last time is long ago.

        Raises:
            OSError: If they can't be written. What was written of them is cut off at the next start.
        """
        if self._again:
            records = (*records, {"event": "again", "lines": self._again})
        block = memoryview(encode(*records))
        end = self._size + len(block)
        while block:
            block = block[self._file.write(block) :]
        self._size, self._dirty = self._file.tell(), True
        self._again, self._overtaken = [], self._overtaken or self._size < end
        self._remember(records)
        if time.monotonic() - self._synced >= _SYNC_S:
            self.sync()

    def _remember(self, records: tuple[dict[str, Any], ...]) -> None:
        now = time.monotonic()
        self._recent.extend((now, record) for record in records if record.get("event") in (None, "drift", "threshold"))
        while self._recent and self._recent[0][0] < now - _COPYING_S:
            self._recent.popleft()

    def sync(self) -> None:
        """Make sure that all lines are on the disk."""
        if self._dirty:
            os.fsync(self._file.fileno())
            self._dirty, self._synced = False, time.monotonic()

    def close(self) -> None:
        """Sync, and let others have the file."""
        self.sync()
        self._file.close()
        os.close(self._lock)

    def _go_on(self) -> int:
        """Make ready to append to what is in the file; the bytes that were cut off."""
        self._file.seek(0)
        start = self._file.read(len(_FIRST))
        if not _FIRST.startswith(start) and set(start) != {0}:
            msg = f"{self.path} holds something else than results of `metarefine watch`. Pass another file as --out."
            raise ValueError(msg)
        size = end = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        self._file.truncate(end)
        self._size, self._dirty = end, size > end
        return size - end


class Printer:
    """Lines to standard output: nothing is remembered."""

    def renewed(self) -> bool:
        """Never."""
        return False

    def append(self, *records: dict[str, Any]) -> None:
        """Write records at once."""
        sys.stdout.buffer.write(encode(*records))
        sys.stdout.buffer.flush()

    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def encode(*records: dict[str, Any]) -> bytes:
    r"""JSON lines.

    ASCII only: a file name that is no valid UTF-8 comes through too.

    Example:
        >>> encode({"path": "ä.png", "score": 0.5})
        b'{"path": "\\u00e4.png", "score": 0.5}\n'
    """
    return b"".join(json.dumps(record, allow_nan=False).encode("ascii") + b"\n" for record in records)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _lock(file: Path, results: Path) -> int:
    """Lock a file for this process, until it ends, however it ends."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        msg = f"Another `metarefine watch` writes to {results}. Stop it first, or pass another file as --out."
        raise ValueError(msg) from error
    return descriptor
