"""Files that do not lie on this machine: object stores, HDFS, archives, by their address as fsspec has it.

A path with ``://`` is an address; every other one is a `pathlib.Path`, and nothing here is imported for it. Addresses
become `upath.UPath`, which has the methods of `pathlib.Path` but is none. Neither torch nor anomalib is imported.
"""

from __future__ import annotations

import errno
import urllib.parse
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

_HEADER = 1 << 16  # bytes that tell the size of nearly every image


def is_remote(path: object) -> bool:
    """Whether a path is an address."""
    return "://" in str(path)


def located(path: str | Path) -> Path:
    """A local path, or what an address leads to; a ``file://`` address is a local path.

    Args:
        path (str | Path): Such as ``parts``, ``s3://bucket/parts`` or ``zip://parts::s3://bucket/all.zip``.

    Raises:
        ModuleNotFoundError: If the package for such an address is not installed.
        ValueError: If there is no such kind of address.
    """
    if not is_remote(path):
        return Path(path)
    if not isinstance(path, str | Path):
        return path
    if str(path).startswith("file://"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(str(path)).path))
    try:
        from upath import UPath

        found: Any = UPath(path)
        _storage(found)  # imports what the protocol needs
    except ImportError as error:
        msg = f"{path} can't be opened ({error}). Run `pip install 'anomalib-metarefine[remote]'`; "
        raise ModuleNotFoundError(msg + "it brings s3fs for s3://, and gs:// needs gcsfs, az:// adlfs.") from error
    except ValueError as error:
        msg = f"{path} is no address that can be opened ({error}). Expected s3://, gs://, az://, hdfs:// or zip://."
        raise ValueError(msg) from error
    return found


def _storage(path: Any) -> Any:  # noqa: ANN401
    """The file system of fsspec that an address leads into; of an archive one for all its files."""
    return _archive(str(path).partition("::")[2]) if path.protocol == "zip" else path.fs


@lru_cache(maxsize=4)  # each has read the archive's table of contents
def _archive(address: str) -> Any:  # noqa: ANN401
    from upath import UPath

    return UPath(f"zip://::{address}").fs


def look_again() -> None:
    """Forget what archives held when they were last looked into."""
    _archive.cache_clear()


def opened(path: str | Path) -> BinaryIO:
    """A file to read, wherever it lies."""
    found: Any = located(path)
    return _storage(found).open(found.path, "rb") if is_remote(path) else found.open("rb")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies under a folder of the same storage."""
    return is_remote(path) == is_remote(folder) and path.is_relative_to(folder)


def names_under(folder: Any) -> list[str]:  # noqa: ANN401
    """Names of all files under a folder of a storage, relative to it, whatever their depth."""
    base = f"{folder.path.strip('/')}/".lstrip("/")
    return [name.lstrip("/").removeprefix(base) for name in _storage(folder).find(folder.path)]


def content(path: str | Path, limit: int | None = None) -> bytes:
    """The first bytes of what an address leads to; raises OSError, whatever its storage raises."""
    try:
        found: Any = located(path)
        storage = _storage(found)
        if limit is None:
            return storage.cat_file(found.path)
        try:
            return storage.cat_file(found.path, 0, limit)
        except OSError as error:
            # There is no such range in an empty object; some servers say so of every shorter one.
            if error.errno != errno.EINVAL or storage.size(found.path) > limit:
                raise
            return storage.cat_file(found.path)
    except OSError:
        raise
    except Exception as error:  # storages have errors of their own
        msg = f"{path} can't be read ({type(error).__name__}: {error})."
        raise OSError(msg) from error


def header(path: str | Path) -> bytes:
    """Enough of an image file to tell its size, of most formats."""
    return content(path, _HEADER)
