"""Carry out a manifest: a folder of kept and one of rejected images. The originals are never touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import pandas as pd

from anomalib_metarefine.curation.repair import Repairer, encoded
from anomalib_metarefine.images.hashes import data_sha256
from anomalib_metarefine.images.sources import absolute, listing
from anomalib_metarefine.images.storage import content, is_remote
from anomalib_metarefine.images.tables import table_text
from anomalib_metarefine.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from anomalib_metarefine.curation.evidence import Evidence
    from anomalib_metarefine.curation.manifest import Manifest
    from anomalib_metarefine.curation.repair import Transplant

Mode = Literal["symlink", "copy", "repair", "list"]
Review = Literal["separate", "keep", "reject"]

REPAIRS_FILE = "repairs.csv"
_UNFINISHED = ".metarefine-unfinished.json"


class Applied(NamedTuple):
    """What was written."""

    counts: dict[str, int]  # images in each folder or list
    left_out: list[str]  # image_path of rejected images that can't be read, and so not copied
    repaired: int = 0  # images of which a region was replaced


def apply(
    manifest: Manifest,
    to: str | Path,
    mode: Mode = "symlink",
    review: Review = "separate",
    progress: bool = False,
    evidence: Evidence | None = None,
) -> Applied:
    """Sort the images into ``keep``, ``reject`` and ``review``.

    ``symlink`` and ``copy`` make folders of these names in ``to``, with the images under their paths relative to the
    root; links are absolute. ``repair`` copies too, but replaces the unusual regions of images that are not rejected by
    the same place of another such image, and lists them in ``repairs.csv`` (``image_path``, ``left``, ``top``,
    ``width``, ``height`` in pixels, ``donor``). ``list`` writes ``keep.txt``, ``reject.txt`` and ``review.txt``, one
    absolute path a line.

    Until all is done, a hidden file in ``to`` says what is being written. Called again with the same arguments after an
    interruption, it goes on; every file that is there is complete.

    Args:
        manifest (Manifest): What was decided.
        to (str | Path): A folder that is empty or does not exist, outside of the root.
        mode (Mode): What to write.
        review (Review): Where images for review go: into their own folder, or with the kept or the rejected ones.
        progress (bool): Whether to show a progress bar.
        evidence (Evidence | None): Of the same curation; ``repair`` needs it to know the unusual regions.

    Returns:
        Applied: Images by folder, what was left out, and how many were repaired.

    Raises:
        ValueError: If ``to`` can't be used, or if images have changed since the manifest was written.
    """
    if mode not in get_args(Mode) or review not in get_args(Review):
        msg = f"mode must be one of {get_args(Mode)} and review one of {get_args(Review)}; "
        raise ValueError(msg + f"found {mode!r} and {review!r}.")
    if mode == "repair" and evidence is None:
        msg = "mode 'repair' needs to know what is unusual. Pass the evidence of the same curation."
        raise ValueError(msg)
    if mode == "symlink" and is_remote(manifest.root):
        msg = f"There are no links to {manifest.root}. Use mode 'copy' or 'list'."
        raise ValueError(msg)
    if is_remote(to):
        msg = f"Images are sorted into a folder of this machine, not into {to}."
        raise ValueError(msg)
    to = absolute(to)
    plan = _plan(manifest, mode, review)
    _check_target(manifest, to, plan)
    manifest.require_unchanged()
    folders = {"keep": "keep", "reject": "reject", "review": "review" if review == "separate" else review}
    table = manifest.table.assign(folder=manifest.table.decision.map(folders))
    left_out = table.image_path[(table.sha256 == "") & (mode in ("copy", "repair"))].tolist()
    table = table[~table.image_path.isin(left_out)]
    broken = [repr(path) for path in table.image_path if mode == "list" and len(path.splitlines()) > 1]
    if broken:
        msg = f"{len(broken)} file names have line breaks, which a list can't hold: {listing(broken)}. "
        msg += "Use another mode."
        raise ValueError(msg)
    names = list(dict.fromkeys(folders.values()))
    to.mkdir(parents=True, exist_ok=True)
    _write(to / _UNFINISHED, [plan])
    repairs: list[tuple[str, Transplant]] = []
    if mode == "list":
        for name in names:
            _write(to / f"{name}.txt", (f"{manifest.root / path}\n" for path in table.image_path[table.folder == name]))
    else:
        for name in names:
            (to / name).mkdir(exist_ok=True)
        if mode == "repair":
            repairs = _repair(manifest, table, evidence, to, progress)
            listed = [(path, *box, donor.relative_to(manifest.root).as_posix()) for path, (*box, donor) in repairs]
            columns = ["image_path", "left", "top", "width", "height", "donor"]
            _write(to / REPAIRS_FILE, [table_text(pd.DataFrame(listed, columns=columns))])
        _place(manifest.root, to, table, mode, progress)
    (to / _UNFINISHED).unlink()
    counts = {name: int((table.folder == name).sum()) for name in names}
    return Applied(counts, left_out, len({path for path, _ in repairs}))


def _plan(manifest: Manifest, mode: Mode, review: Review) -> str:
    """Text that is the same for the same manifest and arguments."""
    decided = data_sha256(manifest.table.image_path, manifest.table.sha256 + " " + manifest.table.decision)
    return json.dumps({"root": str(manifest.root), "decided": decided, "mode": mode, "review": review})


def _check_target(manifest: Manifest, to: Path, plan: str) -> None:
    if to.exists() and not to.is_dir():
        msg = f"{to} is a file. Expected a folder that is empty or does not exist."
        raise ValueError(msg)
    if to.is_dir() and any(to.iterdir()):
        marker = to / _UNFINISHED
        if not marker.is_file():
            msg = f"{to} is not empty. Expected a folder that is empty or does not exist."
            raise ValueError(msg)
        if marker.read_text(encoding="utf-8") != plan:
            msg = f"{to} holds the unfinished work of another manifest, mode or review. Delete it or choose another."
            raise ValueError(msg)
    if is_remote(manifest.root):
        return
    # Links followed: a folder inside the root would be curated next time, whatever it is called.
    real, root = to.resolve(), manifest.root.resolve()
    scattered = root == Path(root.anchor)  # images from all over the file system: everything lies inside
    if root.is_relative_to(real) or (real.is_relative_to(root) and not scattered):
        relation = "contains" if root.is_relative_to(real) else "lies inside"
        msg = f"{to} {relation} the folder of the images, {manifest.root}. Pass a folder outside of it."
        raise ValueError(msg)


def _repair(
    manifest: Manifest, table: pd.DataFrame, evidence: Evidence, to: Path, progress: bool
) -> list[tuple[str, Transplant]]:
    """Write the images that have unusual regions, without them; every other one is left to be copied."""
    normal = table[(table.folder != "reject") & (table.sha256 != "")]
    if not normal.image_path.isin(evidence.unusual_in).any():
        return []
    repairer = Repairer.of(normal.image_path.tolist(), manifest.paths(normal), evidence)
    repairs = []
    for place in track(sorted(repairer.spoilt), "repair images", progress):
        row, repaired = normal.iloc[place], repairer.repair(place)
        if repaired.transplants:
            target = to / row.folder / row.image_path
            with _beside(target) as part:
                part.write_bytes(encoded(repaired.image, target.suffix))
            repairs += [(row.image_path, transplant) for transplant in repaired.transplants]
    return repairs


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Where to write a file that appears in its place only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not the name and a suffix: the name may be as long as a name can be.
    part = target.with_name(f".{hashlib.sha256(target.name.encode()).hexdigest()[:16]}.part")
    yield part
    part.replace(target)


def _write(target: Path, text: Iterable[str]) -> None:
    with _beside(target) as part, part.open("w", encoding="utf-8", newline="") as file:
        file.writelines(text)


def _place(root: Path, to: Path, table: pd.DataFrame, mode: Mode, progress: bool) -> None:
    for row in track(range(len(table)), f"{mode} images", progress):
        name = table.image_path.iloc[row]
        source, target = root / name, to / table.folder.iloc[row] / name
        if os.path.lexists(target):  # from before an interruption
            continue
        if mode == "symlink":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
        else:
            with _beside(target) as part:
                if is_remote(source):
                    part.write_bytes(content(source))
                else:
                    shutil.copy2(source, part)
