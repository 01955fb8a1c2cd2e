"""The files of a run: written together, read only together, by one process at a time.

Files are written to a hidden folder first, which gets its final name when all are complete and on the disk. From that
moment the run counts as written; what a killed process has not moved to its place is moved by the next one that reads
or writes the folder. A storage without renaming gets copies in the same order. ``run.json`` holds the SHA-256 of all
other files, so that a mixture of two runs is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from anomalib_metarefine.images.storage import is_remote, located

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

RUN_FILE, MANIFEST_FILE, EVIDENCE_FILE, REPORT_FILE = "run.json", "manifest.csv", "evidence.npz", "report.html"
PARQUET_FILE = "manifest.parquet"  # in place of the CSV, where it was asked for
_LOCK, _COMPLETE, _UNFINISHED = ".lock", ".complete", ".unfinished-"
_WAIT_S = 10  # for another process that writes its files; a whole run is not waited for


@contextmanager
def locked(folder: str | Path, wait_s: float = 0) -> Iterator[None]:
    """Keep other processes from writing to an output folder; in the same thread it may be nested.

    Args:
        folder (str | Path): Made if it does not exist, so that one that can't be written to is noticed.
        wait_s (float): Seconds to wait for another process.

    Raises:
        OSError: If the folder can't be written to.
        ValueError: If another process is writing to it.
    """
    if is_remote(folder):  # it has no locks: of two runs at once, the one that ends last stays
        yield
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, is_singleton=True)
        lock.acquire(timeout=wait_s)
    except Timeout as error:
        msg = f"Another `metarefine` command is writing to {folder}. Wait until it has ended, or pass another folder."
        raise ValueError(msg) from error
    except OSError as error:
        msg = f"Can't write to {folder} ({error.strerror or error}). Pass a folder that can be written to."
        raise OSError(msg) from error
    try:
        yield
    finally:
        lock.release()


def write_together(folder: str | Path, run: dict[str, Any], files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files of a run and ``run.json``, all or none.

    Args:
        folder (str | Path): Made if it does not exist; may be an address, see `located`.
        run (dict[str, Any]): For ``run.json``. Files that it lists from before, and that are still the same, stay
            part of the run.
        files (Mapping[str, Callable]): By name, what writes the file at the path it is given.

    Raises:
        OSError: If a file can't be written; then the folder is as it was.
        ValueError: If another process is writing to the folder.
    """
    folder = located(folder)
    if is_remote(folder):
        finish_writing(folder)
        with tempfile.TemporaryDirectory() as staging:
            _fill(Path(staging), folder, run, files)
            _upload(Path(staging), folder)
        return
    with locked(folder, _WAIT_S):
        finish_writing(folder)
        for left in folder.glob(f"{_UNFINISHED}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        try:
            _fill(staging, folder, run, files)
            for file in staging.iterdir():
                with file.open("rb+") as written:
                    os.fsync(written.fileno())
            staging.replace(folder / _COMPLETE)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        finish_writing(folder)


def _fill(staging: Path, folder: Path, run: dict[str, Any], files: Mapping[str, Callable[[Path], object]]) -> None:
    """Write the files, and a ``run.json`` that knows them and those that stay in the folder."""
    before = run.get("files", {})
    recorded = {name: known for name, known in before.items() if _digest_of(folder / name) == known}
    for name, write in files.items():
        write(staging / name)
        recorded[name] = _digest_of(staging / name)
    text = json.dumps({**run, "files": recorded}, indent=2, ensure_ascii=False, allow_nan=False)
    (staging / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def _upload(staging: Path, folder: Path) -> None:
    """Write to a place of its own; one small file, written last, says that all is there."""
    place = folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
    place.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        folder.fs.put_file(str(file), (place / file.name).path)
    (folder / _COMPLETE).write_text(place.name)
    finish_writing(folder)


def _finish_upload(folder: Path) -> None:
    marker = folder / _COMPLETE
    if not marker.is_file():
        return
    place = folder / marker.read_text()
    # Last what binds the others: until then, what is read is found to be no run.
    for file in sorted(place.iterdir(), key=lambda file: file.name == RUN_FILE):
        folder.fs.copy(file.path, (folder / file.name).path)
    marker.unlink()
    folder.fs.rm(place.path, recursive=True)


def finish_writing(folder: Path) -> None:
    """Move files to their places that a killed process had completed.

    Raises:
        OSError: If they can't be moved, because another program has one open or the folder is read-only.
    """
    if is_remote(folder):
        _finish_upload(folder)
        return
    complete = folder / _COMPLETE
    if not complete.is_dir():
        return
    try:
        for file in list(complete.iterdir()):
            with suppress(FileNotFoundError):  # another process was quicker
                file.replace(folder / file.name)
        with suppress(FileNotFoundError):
            complete.rmdir()
    except OSError as error:
        msg = f"{folder} has complete new files in {complete} that can't be moved to their places ({error}). "
        raise OSError(msg + "Close programs that have them open, and make the folder writable.") from error


def manifest_file(folder: Path) -> Path:
    """The manifest of the run in a folder: a CSV file, or the Parquet file that ``run.json`` names."""
    finish_writing(folder)
    try:
        in_parquet = PARQUET_FILE in json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, TypeError, KeyError):  # `read_run` says what is wrong
        in_parquet = False
    return folder / (PARQUET_FILE if in_parquet else MANIFEST_FILE)


def read_run(file: Path) -> dict[str, Any]:
    """The ``run.json`` beside a file of a run, after making sure that the file is part of that run.

    Raises:
        FileNotFoundError: If one of the two is missing.
        ValueError: If ``run.json`` is damaged, or the file is not the one that it was written with.
    """
    finish_writing(file.parent)
    run_file = file.with_name(RUN_FILE)
    for required in (file, run_file):
        if not required.is_file():
            msg = f"There is no {required}. Expected {file.name} and {RUN_FILE} of `metarefine curate`."
            raise FileNotFoundError(msg)
    try:
        run = json.loads(run_file.read_text(encoding="utf-8"))
        recorded = run["files"].get(file.name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"{run_file} is damaged: expected a JSON object with `files` and what was run. "
        raise ValueError(msg + "Run `metarefine curate` again.") from error
    if recorded != _digest_of(file):
        msg = f"{file} is not the file that {RUN_FILE} was written with: it is cut off, edited, or of another run. "
        raise ValueError(
            msg + "Bring back both, or run `metarefine curate` again. `metarefine review` changes decisions."
        )
    return run


def _digest_of(file: Path) -> str | None:
    """SHA-256 of a file; the same for both kinds of line ends, as version control changes them."""
    if not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
