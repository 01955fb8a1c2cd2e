"""Images as they arrive: in a folder, or as paths on standard input. Nothing is taken that is still being written."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, NamedTuple

from anomalib_metarefine.images.reading import EXTENSIONS, UnreadableImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_LINES_AHEAD = 1_000  # paths read from standard input before the images are processed
_MOST_WAITING = 10_000  # paths whose files aren't there or whole yet; then no more lines are read
_BLOCK = 1 << 16  # bytes


class Arrival(NamedTuple):
    """A file as it was found. Written anew, it is another one.

    Attributes:
        path (str): Absolute.
        size (int | None): Bytes; ``None`` if there is no such file.
        mtime_ns (int | None): Time of the last change, in nanoseconds.
    """

    path: str
    size: int | None
    mtime_ns: int | None


@dataclass
class Rules:
    """When a file is taken, and when it is given up.

    Attributes:
        settle (float): Seconds that a file must not have changed before it is read.
        patience (float): Seconds that an unreadable file must not have changed before it is called corrupt, and that a
            missing or locked one is waited for.
        extensions (Sequence[str]): File names to look for in a folder, in any case.
    """

    settle: float = 0.2
    patience: float = 10.0
    extensions: Sequence[str] = EXTENSIONS


@dataclass
class _Waiting:
    """Files that were seen but are not done, and since when they are as they are."""

    rules: Rules
    since: dict[str, tuple[Arrival, float]] = field(default_factory=dict)

    def settled(self, arrival: Arrival) -> bool:
        return self._quiet(arrival) >= self.rules.settle

    def gives_up(self, arrival: Arrival, error: Exception) -> bool:
        if isinstance(error, UnreadableImageError):
            return self._quiet(arrival) >= self.rules.patience
        if isinstance(error, ValueError):  # the model doesn't take it, and never will
            return True
        return self._known(arrival) >= self.rules.patience

    def _known(self, arrival: Arrival) -> float:
        """Seconds since it was first seen like this, by our own clock."""
        known, since = self.since.get(arrival.path, (None, 0.0))
        if known != arrival:
            since = time.monotonic()
            self.since[arrival.path] = (arrival, since)
        return time.monotonic() - since

    def _quiet(self, arrival: Arrival) -> float:
        """Seconds without a change. The clock of a file server may be ahead of ours, so its times alone don't do."""
        known = self._known(arrival)
        return known if arrival.mtime_ns is None else max(known, time.time() - arrival.mtime_ns / 1e9)


class Seen:
    """Which images are done: a 64-bit hash each; two of a million share one with a probability of 3e-8.

    Args:
        most (int): Past it, those are forgotten that no look came across for longest.
    """

    def __init__(self, most: int) -> None:
        self._hashes: OrderedDict[int, None] = OrderedDict()
        self.most = most

    def __contains__(self, arrival: Arrival) -> bool:
        found = hash(arrival) in self._hashes
        if found:
            self._hashes.move_to_end(hash(arrival))
        return found

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, arrival: Arrival) -> None:
        """Remember an image."""
        self._hashes[hash(arrival)] = None
        if len(self._hashes) > self.most:
            self._hashes.popitem(last=False)


class Folder:
    """The images in a folder and its subfolders; hidden ones are skipped, links to folders not followed.

    Found by listing it, again and again: this works on every system and network share.

    Args:
        root (Path): The folder.
        rules (Rules): When a file is taken.
        done (Callable): Whether an image needs no more processing.
        once (bool): Only the images that are there at the first look.

    Attributes:
        exhausted (bool): All images of the first look are done (only with ``once``).
        reachable (bool): The folder was there at the last look.
        listed (int): Images in it at the last look, done or not.
        stirred (bool): Always false: only a look can tell.

    Raises:
        FileNotFoundError: If there is no such folder.
    """

    stirred = False

    def __init__(self, root: Path, rules: Rules, done: Callable[[Arrival], bool], once: bool = False) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would follow links, and so change the paths
        if not self.root.is_dir():
            msg = f"There is no folder {self.root}. Pass a folder of images, or - for paths on standard input."
            raise FileNotFoundError(msg)
        self._extensions = tuple(extension.lower() for extension in rules.extensions)
        self._done, self._once = done, once
        self._waiting = _Waiting(rules)
        self._scope: list[str] | None = None
        self.exhausted, self.reachable, self.listed = False, True, 0

    def ready(self) -> list[Arrival]:
        """The images that can be read now, oldest first."""
        self.reachable, self.listed = self.root.is_dir(), 0
        found = self._walk(self.root) if self._scope is None else map(look, self._scope)
        # By path: a folder that changes while it is listed may show a file twice.
        by_path = {arrival.path: arrival for arrival in found if arrival.size is not None and not self._done(arrival)}
        new = sorted(by_path.values(), key=lambda arrival: (arrival.mtime_ns, arrival.path))
        if self._once:
            self._scope = [arrival.path for arrival in new]
            self.exhausted = not new
        ready = [arrival for arrival in new if self._waiting.settled(arrival)]
        self._waiting.since = {path: entry for path, entry in self._waiting.since.items() if path in by_path}
        return ready

    def gives_up(self, arrival: Arrival, error: Exception) -> bool:
        """Whether an image that could not be read is not to be tried again."""
        return isinstance(error, FileNotFoundError) or self._waiting.gives_up(arrival, error)

    def processed(self) -> Iterator[Arrival]:
        """The images in the folder that are done."""
        return filter(self._done, self._walk(self.root))

    def _walk(self, folder: Path | str) -> Iterator[Arrival]:
        """All images, one at a time: a folder may hold a million."""
        try:
            entries = os.scandir(folder)
        except OSError:  # gone, or a network share that is away: the next look may find it
            return
        with entries:
            while True:
                try:
                    entry = next(entries, None)
                    if entry is None:
                        return
                    if entry.name.startswith("."):
                        continue
                    is_folder = entry.is_dir(follow_symlinks=False)
                    stat = entry.stat() if not is_folder and entry.name.lower().endswith(self._extensions) else None
                except FileNotFoundError:  # moved away just now, or a broken link
                    continue
                except OSError:
                    return
                if is_folder:
                    yield from self._walk(entry.path)
                elif stat is not None and S_ISREG(stat.st_mode):
                    self.listed += 1
                    yield Arrival(entry.path, stat.st_size, stat.st_mtime_ns)


class Lines:
    """Paths on standard input, one per line, relative ones to the working folder.

    Args:
        descriptor (int): Of the file to read the lines from.
        rules (Rules): When a file is taken.
        done (Callable): Whether an image needs no more processing.

    Attributes:
        reachable (bool): Always true.
        listed (int): Always 0: what is remembered is all that is known of earlier lines.
    """

    reachable, listed = True, 0

    def __init__(self, descriptor: int, rules: Rules, done: Callable[[Arrival], bool]) -> None:
        self._done = done
        self._waiting = _Waiting(rules)
        self._paths: dict[str, None] = {}
        self._lines: queue.Queue[str | None] = queue.Queue(_LINES_AHEAD)
        self._ended = False
        threading.Thread(target=_read_lines, args=(descriptor, self._lines), daemon=True).start()

    @property
    def exhausted(self) -> bool:
        """Whether the input has ended and all its images are done."""
        return self._ended and not self._paths

    @property
    def stirred(self) -> bool:
        """Whether there are new lines, and room for them."""
        return not self._lines.empty() and len(self._paths) < _MOST_WAITING

    def ready(self) -> list[Arrival]:
        """The images that can be read now, in the order of the lines."""
        self._take()
        found = [look(path) for path in self._paths]
        new = [arrival for arrival in found if not self._done(arrival)]
        self._paths = dict.fromkeys(arrival.path for arrival in new)
        self._waiting.since = {path: entry for path, entry in self._waiting.since.items() if path in self._paths}
        return [arrival for arrival in new if self._waiting.settled(arrival)]

    def gives_up(self, arrival: Arrival, error: Exception) -> bool:
        """Whether an image that could not be read is not to be tried again."""
        return self._waiting.gives_up(arrival, error)

    def processed(self) -> Iterator[Arrival]:
        """Nothing: what is remembered can't be listed."""
        return iter(())

    def _take(self) -> None:
        for _ in range(min(_LINES_AHEAD, _MOST_WAITING - len(self._paths))):
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return
            if line is None:
                self._ended = True
                return
            self._paths[os.path.abspath(line)] = None  # noqa: PTH100


def look(path: str) -> Arrival:
    """A file as it is now."""
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return Arrival(path, None, None)
    return Arrival(path, stat.st_size, stat.st_mtime_ns)


def _read_lines(descriptor: int, lines: queue.Queue[str | None]) -> None:
    """Put lines into a queue, and ``None`` at the end.

    With ``os.read``: a thread that waits in a buffered read would keep the process from ending.
    """
    rest = b""
    while block := os.read(descriptor, _BLOCK):
        *whole, rest = (rest + block).split(b"\n")
        for line in filter(None, (line.rstrip(b"\r") for line in whole)):
            lines.put(os.fsdecode(line))
    if rest.strip():
        lines.put(os.fsdecode(rest.rstrip(b"\r")))
    lines.put(None)
