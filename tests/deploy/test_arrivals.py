import os
import threading
import time
from pathlib import Path

import pytest

from anomalib_metarefine.deploy import arrivals
from anomalib_metarefine.deploy.arrivals import Arrival, Folder, Lines, Rules, Seen, look
from anomalib_metarefine.images import sources
from anomalib_metarefine.images.reading import UnreadableImageError

BROKEN, LOCKED = UnreadableImageError("a.png", "cut off"), PermissionError(13, "locked")


@pytest.fixture
def clock(monkeypatch):
    """Both clocks, moved by hand: the computer's own, and the time of day."""

    class Clock:
        now = 1e9

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(arrivals.time, "monotonic", lambda: clock.now - 5e8)
    monkeypatch.setattr(arrivals.time, "time", lambda: clock.now)
    return clock


def write(path, content, at):
    path.write_bytes(content)
    os.utime(path, (at, at))
    return look(str(path))


def paths(found):
    return [Path(arrival.path).name for arrival in found]


def test_the_same_images_as_for_curation():
    assert arrivals.EXTENSIONS == sources.EXTENSIONS


class TestFolder:
    def folder(self, root, done=(), **settings):
        once = settings.pop("once", False)
        return Folder(root, Rules(**({"settle": 1, "patience": 10} | settings)), lambda arrival: arrival in done, once)

    def test_takes_what_has_settled(self, tmp_path, clock):
        folder = self.folder(tmp_path)
        write(tmp_path / "old.png", b"1", clock.now - 100)
        write(tmp_path / "new.png", b"1", clock.now - 0.5)
        assert paths(folder.ready()) == ["old.png"]
        clock.sleep(0.6)
        assert paths(folder.ready()) == ["old.png", "new.png"]
        write(tmp_path / "new.png", b"12", clock.now)  # it goes on
        assert paths(folder.ready()) == ["old.png"]

    def test_a_file_server_whose_clock_is_ahead(self, tmp_path, clock):
        folder = self.folder(tmp_path)
        arrival = write(tmp_path / "a.png", b"1", clock.now + 3600)
        assert folder.ready() == []
        clock.sleep(1.1)
        assert folder.ready() == [arrival]
        arrival = write(tmp_path / "a.png", b"12", clock.now + 3600)
        assert folder.ready() == []
        clock.sleep(1.1)
        assert folder.ready() == [arrival]

    def test_gives_up_in_time(self, tmp_path, clock):
        folder = self.folder(tmp_path)
        arrival = write(tmp_path / "a.png", b"1", clock.now)
        clock.sleep(2)
        folder.ready()
        assert not folder.gives_up(arrival, BROKEN)
        clock.sleep(9)
        assert folder.gives_up(arrival, BROKEN)
        assert not folder.gives_up(arrival, LOCKED)  # first met two seconds later
        clock.sleep(2)
        assert folder.gives_up(arrival, LOCKED)
        assert folder.gives_up(Arrival("gone", 1, 1), FileNotFoundError(2, "gone"))

    def test_old_files_are_given_up_at_once_but_locked_ones_are_not(self, tmp_path, clock):
        folder = self.folder(tmp_path)
        arrival = write(tmp_path / "a.png", b"1", clock.now - 1000)
        assert folder.ready() == [arrival]
        assert folder.gives_up(arrival, BROKEN)
        assert not folder.gives_up(arrival, LOCKED)

    def test_once_means_the_first_look(self, tmp_path, clock):
        done = []
        folder = self.folder(tmp_path, done, once=True)
        first = write(tmp_path / "a.png", b"1", clock.now - 5)
        late = write(tmp_path / "b.png", b"1", clock.now)
        assert folder.ready() == [first]
        done.append(first)
        write(tmp_path / "c.png", b"1", clock.now)
        clock.sleep(2)
        assert folder.ready() == [late]
        assert not folder.exhausted
        done.append(late)
        assert folder.ready() == []
        assert folder.exhausted

    def test_a_folder_that_goes_away_and_comes_back(self, tmp_path, clock):
        root = tmp_path / "share"
        root.mkdir()
        folder = self.folder(root)
        root.rename(tmp_path / "away")
        assert (folder.ready(), folder.reachable) == ([], False)
        (tmp_path / "away").rename(root)
        write(root / "a.png", b"1", clock.now - 5)
        assert (paths(folder.ready()), folder.reachable, folder.listed) == (["a.png"], True, 1)


class TestLines:
    def read(self, content, count, done=()):
        """Until so many paths have come."""
        reading, writing = os.pipe()
        lines = Lines(reading, Rules(settle=0, patience=0), lambda arrival: arrival in done)
        threading.Thread(target=lambda: (os.write(writing, content), os.close(writing))).start()
        found, end = [], time.monotonic() + 10
        while len(found) < count and time.monotonic() < end:
            found = lines.ready()
        return lines, found

    def test_of_every_kind(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        lines, found = self.read(b"a.png\r\n\n./b c.png\na.png\n/x/\xff.png", 3)
        assert [arrival.path for arrival in found] == [f"{tmp_path}/a.png", f"{tmp_path}/b c.png", "/x/\udcff.png"]
        assert {(arrival.size, arrival.mtime_ns) for arrival in found} == {(None, None)}
        assert not lines.exhausted

    def test_longer_than_a_block(self):
        long = b"/" + b"x" * 200_000 + b".png"
        _, found = self.read(long + b"\n/y", 2)
        assert [len(arrival.path) for arrival in found] == [len(long), 2]

    def test_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(arrivals, "_MOST_WAITING", 50)
        lines, found = self.read(b"".join(b"/missing/%d.png\n" % i for i in range(500)), 50)
        for _ in range(5):
            assert len(lines.ready()) == 50
        assert not lines.stirred
        assert found[0].path == "/missing/0.png"


def test_memory_of_what_is_done_is_bounded():
    seen = Seen(most=3)
    for path in "abc":
        seen.add(Arrival(path, 1, 1))
    assert Arrival("a", 1, 1) in seen  # looked for, so the last to be forgotten
    seen.add(Arrival("d", 1, 1))
    assert [Arrival(path, 1, 1) in seen for path in "abcd"] == [True, False, True, True]
    assert len(seen) == 3
