"""A review: which images are shown next, what was answered, and where it stands. All of it is in the folder's files."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_metarefine.curation.decisions import append
from anomalib_metarefine.curation.evidence import Evidence
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.review.order import directions, kernel_features, reorder
from anomalib_metarefine.curation.review.pages import PAGES_FILE, Entry, Page, append_page, read_pages
from anomalib_metarefine.curation.run_folder import EVIDENCE_FILE
from anomalib_metarefine.curation.stopping import Forecast, Look, Standing, forecast, standing
from anomalib_metarefine.images.answers import DECISIONS_FILE, Answer, load

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_SIZE = 12
_AUDIT_AT_FIRST, _AUDIT_LATER = 2, 6  # images of a page drawn at random, while dirty ones are found and once none are
_AWAY = 600  # seconds without a sign of a tab
_MOST_ALIKE = 60  # images on a page of look-alikes
_ALIKE = 0.5  # cosine of what is unusual about two images: 91 % of look-alikes are of a kind, dirty or clean, on six
# real families; at 0.4, 84 %
_QUIET_PAGES = 2  # without a dirty image in order, and the page's random share grows


@dataclass(frozen=True)
class Image:
    """One content; copies of a file are one image.

    Attributes:
        index (int): Its place in the session, and its name in addresses.
        sha256 (str): Of the file.
        paths (list[str]): ``image_path`` of the file and of its copies.
        row (dict): The manifest's row of the first.
    """

    index: int
    sha256: str
    paths: list[str]
    row: dict[str, Any]

    @property
    def path(self) -> str:
        """``image_path`` of the first copy."""
        return self.paths[0]


class Session:
    """A review of the images of one curation. Safe for several threads, and for several processes on one folder.

    Args:
        folder (str | Path): Output folder of ``metarefine curate``.
        by (str): Who answers, for the record.
        seed (int | None): Of the audit's draws; ``None`` is unpredictable, as an audit should be.

    Raises:
        FileNotFoundError: If the folder has no manifest.
        ValueError: If it can't be used, or no image can be shown.
    """

    def __init__(self, folder: str | Path, by: str = "", seed: int | None = None) -> None:
        self.folder, self.by = Path(folder), by
        self.manifest = Manifest.read(self.folder)
        self.images = _images(self.manifest)
        if not self.images:
            msg = f"{self.folder} has no image that can be read, so there is nothing to review."
            raise ValueError(msg)
        self.evidence = Evidence.load(self.folder / EVIDENCE_FILE) if (self.folder / EVIDENCE_FILE).exists() else None
        features = _features(self.images, self.evidence)
        self._directions = directions(np.zeros((len(self.images), 1)) if features is None else features)
        self._kernel = None if features is None else kernel_features(self._directions)
        self.scores = np.array([image.row["score"] for image in self.images])
        self.twins = _twins(self.images)
        self.variants = np.array([image.row["variant"] for image in self.images])
        self._index = {image.sha256: image.index for image in self.images}
        self._drawn_from = hashlib.sha256(" ".join(sorted(self._index)).encode()).hexdigest()
        self._random = np.random.default_rng(seed)
        self._lock = threading.RLock()
        self._seen: dict[str, float] = {}  # when each tab was heard of last: what it left goes to others after a while
        self._stamp: tuple[int, ...] = ()  # sizes of the two files when they were read
        self._order: tuple[np.ndarray, Forecast] | None = None
        self._refresh()

    @property
    def root(self) -> Path:
        """Folder that image paths are relative to."""
        return self.manifest.root

    def next_page(self, client: str) -> Page | None:
        """Choose, log and hand out a page; ``None`` if every image has an answer or is with somebody else."""
        with self._lock:
            self._refresh()
            self._seen[client] = time.monotonic()
            rest = [i for i in self._order_now()[0].argsort(kind="stable")[::-1].tolist() if i not in self._shown]
            if not rest:
                return self._again(client)
            audits = _AUDIT_LATER if self._is_quiet() else _AUDIT_AT_FIRST
            queue = rest[: PAGE_SIZE - audits]
            pool = rest[len(queue) :]
            audit = self._random.permutation(pool)[:audits].tolist()
            return self._log(client, queue, audit, "order")

    def page(self, number: int) -> Page | None:
        """A page that was handed out before; ``None`` if there is none of this number."""
        with self._lock:
            self._refresh()
            return self._pages[number] if 0 <= number < len(self._pages) else None

    def alike(self, client: str, index: int, by: str = "look") -> Page | None:
        """A page of the images that `undecided_alike` finds; ``None`` if there are none."""
        return self.chosen(client, self.undecided_alike(index, by), "alike")

    def chosen(self, client: str, images: Sequence[int], kind: str = "chosen") -> Page | None:
        """A page of these images, at most 60 of them; ``None`` if there are none."""
        with self._lock:
            self._refresh()
            self._seen[client] = time.monotonic()
            return self._log(client, images[:_MOST_ALIKE], [], kind) if len(images) else None

    def undecided_alike(self, index: int, by: str = "look") -> list[int]:
        """Images without an answer that are of one kind with this one, itself among them, the most alike first.

        Args:
            index (int): The image.
            by (str): "look": unusual in the same way, or near duplicates. "variant": of the same variant; none where
                that is the largest.
        """
        if by == "variant":
            own = self.variants[index]
            members = np.flatnonzero(self.variants == own) if own > 0 else np.array([index])
        else:
            near = self._directions @ self._directions[index]
            near[list(self.twins[index])] = 1.0
            near[index] = 2.0
            members = np.argsort(-near, kind="stable")[: int((near >= _ALIKE).sum())]
        return [i for i in members.tolist() if i not in self.answers]

    @cached_property
    def plane(self) -> np.ndarray | None:
        """Place of each image on the map, ``[N x 2]`` in [0, 1]: principal components of what is unusual about it."""
        if self._kernel is None:
            return None
        _, _, axes = np.linalg.svd(self._directions, full_matrices=False)
        places = self._directions @ axes[:2].T
        return (places - places.min(0)) / np.maximum(np.ptp(places, axis=0), 1e-9)

    def answer(self, decisions: dict[int, str], client: str = "") -> None:
        """Put answers on the disk. They hold for every copy of an image.

        Args:
            decisions (dict[int, str]): Keep or reject, or nothing to take an answer back, by image.
            client (str): The tab that they come from.

        Raises:
            ValueError: If there is no such image or decision.
        """
        for index, decision in decisions.items():
            if not 0 <= index < len(self.images) or decision not in ("keep", "reject", ""):
                msg = f"Expected keep, reject or nothing for an image below {len(self.images)}, "
                msg += f"found {decision!r} for {index}."
                raise ValueError(msg)
        with self._lock:
            self._seen[client] = time.monotonic()
            rows = [
                Answer(path, self.images[i].sha256, decision or "review", by=self.by)
                for i, decision in decisions.items()
                for path in self.images[i].paths
            ]
            append(self.folder, rows)
            self._refresh()

    def standing(self) -> Standing:
        """What was looked at and found, and what is left."""
        with self._lock:
            self._refresh()
            return standing(self._looks(), len(self.images), self._order_now()[1])

    def soon(self, count: int = PAGE_SIZE) -> list[int]:
        """Images that will likely be shown next, for a browser to load ahead."""
        with self._lock:
            order = self._order_now()[0].argsort(kind="stable")[::-1].tolist()
            return [i for i in order if i not in self._shown][:count]

    def _order_now(self) -> tuple[np.ndarray, Forecast]:
        if self._order is None:
            dirty = {i: decision == "reject" for i, decision in self.answers.items()}
            values = reorder(self.scores, self._kernel, dirty)
            self._order = values, forecast(values, dirty)
        return self._order

    def _looks(self) -> list[Look]:
        return [Look(audit, self._dirty(i)) for i, audit in self._shown.items()]

    def _dirty(self, index: int) -> bool | None:
        return self.answers[index] == "reject" if index in self.answers else None

    def _is_quiet(self) -> bool:
        """Whether nothing dirty was found lately, so that looking at random tells more than going down the order."""
        pages = [page for page in self._pages if page.kind == "order"][-_QUIET_PAGES:]
        return len(pages) == _QUIET_PAGES and not any(self._dirty(i) for page in pages for i in page.images)

    def _again(self, client: str) -> Page | None:
        """Undecided images that no other tab has before it."""
        now = time.monotonic()
        others = {name for name, seen in self._seen.items() if name != client and now - seen < _AWAY}
        last = {page.client: page for page in self._pages}
        with_others = {i for name in others & set(last) for i in last[name].images}
        left = [i for i in self._shown if i not in self.answers and i not in with_others][:PAGE_SIZE]
        return self._log(client, left, [], "again") if left else None

    def _log(self, client: str, queue: Sequence[int], audit: Sequence[int], kind: str) -> Page:
        """Write a page down before anybody sees it: the bound needs to know what was drawn, even after a kill."""
        queued, drawn = ([self.images[i].sha256 for i in part] for part in (queue, audit))
        append_page(self.folder, Entry(kind, client, self._drawn_from, queued, drawn))
        self._refresh()
        return self._pages[-1]

    def _refresh(self) -> None:
        """Read the files again if somebody has written to them."""
        files = [self.folder / DECISIONS_FILE, self.folder / PAGES_FILE]
        stamp = tuple(file.stat().st_size if file.exists() else 0 for file in files)
        if stamp == self._stamp:
            return
        known = load(self.folder)
        self.answers = {self._index[sha256]: answer for sha256, answer in known.items() if sha256 in self._index}
        self._pages = read_pages(self.folder, self._index, self._drawn_from)
        self._shown: dict[int, bool] = {}  # whether it was drawn at random, in the order in which they were chosen
        for page in self._pages:
            for i in [*(i for i in page.images if i not in page.audit), *page.audit]:
                self._shown.setdefault(i, i in page.audit)
        self._stamp, self._order = stamp, None
        given = [i for i in self.answers if i not in self._shown]
        if given:  # answers from elsewhere were no draws: they must stand before the next page in the log
            self._log("", given, [], "given")


def _images(manifest: Manifest) -> list[Image]:
    table = manifest.table[(manifest.table.decided_by != "unreadable") & (manifest.table.sha256 != "")]
    return [
        Image(index, sha256, rows.image_path.tolist(), rows.iloc[0].to_dict())
        for index, (sha256, rows) in enumerate(table.groupby("sha256", sort=False))
    ]


def _features(images: list[Image], evidence: Evidence | None) -> np.ndarray | None:
    """One row an image; ``None`` where the curation stored none for one of them."""
    row_of = {name: row for row, name in enumerate(evidence.images)} if evidence else {}
    if not all(image.path in row_of for image in images):
        return None
    return evidence.features[[row_of[image.path] for image in images]].astype(np.float32)


def _twins(images: list[Image]) -> list[set[int]]:
    """Near duplicates of each image, itself among them: those that the search for duplicates named together."""
    names = [
        {
            image.path,
            *(part.split(" of ", 1)[1] for part in image.row["quality"].split("; ") if " duplicate of " in part),
        }
        for image in images
    ]
    members: dict[str, set[int]] = {}
    for image, own in zip(images, names, strict=True):
        for name in own:
            members.setdefault(name, set()).add(image.index)
    return [set().union(*(members[name] for name in own)) for own in names]
