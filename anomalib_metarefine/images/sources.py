"""Where training images come from: a folder, a table of paths, an anomalib datamodule or its config."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.images.datamodules import load_datamodule, set_up_without_validation
from anomalib_metarefine.images.reading import EXTENSIONS
from anomalib_metarefine.images.storage import is_inside, is_remote, located, look_again, names_under
from anomalib_metarefine.images.tables import read_table

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule

logger = logging.getLogger(__name__)

_CONFIGS, _TABLES = (".yaml", ".yml"), (".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """A list of training images.

    Attributes:
        root (Path): Absolute folder that all images lie under.
        paths (list[Path]): Absolute paths, sorted, each once. Symbolic links are not resolved.
        name (str): What to call the data set.
        datamodule (AnomalibDataModule | None): A copy of the datamodule that the images are the training set of.
        variants (dict[Path, str] | None): Column ``variant`` of a table, by path.
    """

    root: Path
    paths: list[Path]
    name: str
    datamodule: AnomalibDataModule | None = None
    variants: dict[Path, str] | None = None

    @property
    def names(self) -> list[str]:
        """The paths relative to ``root``, with ``/``: the ``image_path`` of a manifest."""
        return [path.relative_to(self.root).as_posix() for path in self.paths]


def read_source(
    data: str | Path | AnomalibDataModule | Iterable[str | Path],
    root: str | Path | None = None,
    extensions: Sequence[str] = EXTENSIONS,
) -> Source:
    """List the training images, each once.

    Args:
        data (str | Path | AnomalibDataModule | Iterable[str | Path]): One of

            - a folder, searched with all its subfolders; hidden files and folders are skipped, links to folders are
              followed once; or a zip archive, or the address of either, see `located`;
            - a CSV or Parquet file with a column ``image_path``; a manifest of ours is one, and all its images
              are taken, whatever was decided about them;
            - a YAML file with ``class_path`` and ``init_args`` of an anomalib datamodule, at its top or under ``data``;
            - such a datamodule: its training set, before a validation set is taken out of it;
            - image paths.
        root (str | Path | None): What paths in a table, and the names in the manifest, are relative to. ``None`` takes
            the folder; for a table, the folder it lies in (for our manifest, the root it was made with); for
            anything else, and where a table's images lie elsewhere, the folder that all images have in common.
        extensions (Sequence[str]): File names to look for in a folder, in any case. Files that a table or a datamodule
            names are taken as they are.

    Raises:
        FileNotFoundError: If there are no images, or files are missing.
        PermissionError: If a folder can't be read.
        ModuleNotFoundError: If a Parquet file is given and pyarrow is not installed.
        ValueError: If the table has no ``image_path``, the config is unusable, or images lie outside ``root``.
    """
    if not isinstance(data, str | Path) and not is_remote(data):
        if isinstance(data, Iterable):
            return _source([located(path) for path in data], root, "images", "the list of paths")
        return _from_datamodule(data, root)
    path = absolute(located(str(data)).expanduser())
    if path.suffix.lower() == ".zip" and path.exists() and not path.is_dir():
        path = located(f"zip://::{path}")
    look_again()
    if is_remote(path) and path.is_dir():
        return _source(_images_at(path, extensions), root or path, path.name or "images", str(path))
    if path.is_dir():
        return _source(list(_images_under(path, extensions)), root or path, path.name, str(path))
    if not path.exists():
        msg = (
            f"There is no {path}. Expected a folder of images, a {_either(_TABLES)} file or a {_either(_CONFIGS)} file."
        )
        raise FileNotFoundError(msg)
    if path.suffix.lower() in _CONFIGS:
        return _from_datamodule(load_datamodule(path), root)
    if path.suffix.lower() in _TABLES:
        return _from_table(path, root)
    msg = f"Can't take images from {path}. Expected a folder, a {_either(_TABLES)} file or a {_either(_CONFIGS)} file."
    raise ValueError(msg)


def absolute(path: str | Path) -> Path:
    """The path from the file system's root, with links as they are: a link to an image goes by its own name."""
    path = located(path)
    return path if is_remote(path) else Path(os.path.abspath(path))  # noqa: PTH100  (`resolve` follows links)


def listing(items: Sequence[object], limit: int = 5) -> str:
    """The first few of a list, for a message.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(str(item) for item in items[:limit]) + more


def _images_under(folder: Path, extensions: Sequence[str]) -> Iterator[Path]:
    wanted = tuple(f".{extension.lstrip('.')}".lower() for extension in extensions)
    seen: set[str] = set()
    closed: list[OSError] = []
    found = False
    waiting = [folder]
    # Real folders first, then those that links lead to: a folder reached both ways goes by its real name.
    while waiting:
        for directory, subfolders, files in os.walk(waiting.pop(0), onerror=closed.append):
            real = os.path.realpath(directory)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            waiting += [link for name in subfolders if (link := Path(directory, name)).is_symlink()]
            for name in files:
                if not name.startswith(".") and name.lower().endswith(wanted):
                    found = True
                    yield Path(directory, name)
    if closed:  # a part of the images that nobody misses would be worse than none
        reasons = listing([f"{error.filename} ({error.strerror})" for error in closed])
        msg = f"{len(closed)} folders under {folder} can't be read: {reasons}. "
        msg += "Make them readable, or pass a table of paths."
        raise PermissionError(msg)
    if not found:
        raise _nothing_under(folder, wanted)


def _images_at(folder: Path, extensions: Sequence[str]) -> list[Path]:
    """As `_images_under`, of a storage: it has no links, and lists all that lies under a folder in one go."""
    wanted = tuple(f".{extension.lstrip('.')}".lower() for extension in extensions)
    names = [name for name in names_under(folder) if name.lower().endswith(wanted) and not f"/{name}".count("/.")]
    if not names:
        raise _nothing_under(folder, wanted)
    return [folder / name for name in names]


def _nothing_under(folder: Path, wanted: tuple[str, ...]) -> FileNotFoundError:
    msg = f"No images under {folder} (looked for {', '.join(wanted)}). Pass --extensions or check the path."
    return FileNotFoundError(msg)


def _from_table(file: Path, root: str | Path | None) -> Source:
    table = read_table(file)
    if "image_path" not in table:
        msg = f"{file} has no column image_path; found {listing(list(table.columns))}. Rename that with the paths."
        raise ValueError(msg)
    base = absolute(root) if root else _root_of_manifest(file) or file.parent
    listed = [str(path) for path in table.image_path.fillna("")]
    if "" in listed:
        msg = f"{file} has no image_path in row {listed.index('') + 1} (of {len(listed)})."
        raise ValueError(msg)
    paths = [located(path) if is_remote(path) else base / path for path in listed]
    inside = all(is_inside(absolute(path), base) for path in paths)
    hint = f"Relative paths are relative to {base}; pass --root if they are not."
    source = _source(paths, root or (base if inside else None), file.stem, str(file), hint)
    if "variant" not in table:
        return source
    return replace(source, variants=dict(zip(map(absolute, paths), map(str, table["variant"]), strict=True)))


def _root_of_manifest(file: Path) -> Path | None:
    run = file.with_name("run.json")
    if file.stem != "manifest" or not run.is_file():
        return None
    try:
        return located(json.loads(run.read_text(encoding="utf-8"))["root"])
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{run} lies beside {file.name} but names no root. Pass --root."
        raise ValueError(msg) from error


def _from_datamodule(data: AnomalibDataModule, root: str | Path | None) -> Source:
    from anomalib.data import AnomalibDataModule

    if not isinstance(data, AnomalibDataModule):
        msg = f"Can't take images from a {type(data).__name__}. Expected a path, paths or an anomalib datamodule."
        raise ValueError(msg)
    whole = set_up_without_validation(data)  # kept: images that it makes live as long as it does
    samples = whole.train_data.samples
    name = " ".join(part for part in (data.name, data.category) if part)
    source = _source([Path(path) for path in samples.image_path], root, name, f"the training set of {name}")
    return Source(source.root, source.paths, name, whole)


def _source(paths: list[Path], root: str | Path | None, name: str, origin: str, hint: str = "") -> Source:
    """Check, sort and deduplicate; ``root`` None takes the common folder."""
    if not paths:
        msg = f"No images in {origin}."
        raise FileNotFoundError(msg)
    listed = [absolute(path) for path in paths]
    # One request an image would be slow; what a storage does not have is found unreadable.
    missing = [path for path in listed if not is_remote(path) and not os.path.lexists(path)]
    if missing:
        msg = f"{len(missing)} of {len(listed)} images in {origin} do not exist: {listing(missing)}. {hint}"
        raise FileNotFoundError(msg.strip())
    unique = sorted(set(listed), key=lambda path: path.as_posix())
    if len(unique) < len(listed):
        logger.warning(
            "%d images are named more than once in %s; each is taken once.", len(listed) - len(unique), origin
        )
    garbled = [repr(str(path)) for path in unique if not _is_line(path)]
    if garbled:
        msg = f"{len(garbled)} file names in {origin} are no line of text: {listing(garbled)}. Rename the files."
        raise ValueError(msg)
    base = absolute(root) if root else _common_folder(unique)
    outside = [path for path in unique if not is_inside(path, base)]
    if outside:
        msg = f"{len(outside)} of {len(unique)} images in {origin} lie outside the root {base}: {listing(outside)}."
        raise ValueError(msg)
    return Source(base, unique, name)


def _common_folder(paths: list[Path]) -> Path:
    if not any(map(is_remote, paths)):
        return Path(os.path.commonpath([path.parent for path in paths]))
    folder = paths[0].parent
    while folder != folder.parent and not all(is_inside(path, folder) for path in paths):
        folder = folder.parent
    return folder


def _is_line(path: Path) -> bool:
    """Whether a table of lines can hold the name."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return not any(character in str(path) for character in "\r\n")


def _either(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffixes)
