"""The files of a run appear together, whatever happens while they are written."""

import json
import multiprocessing
import os
import random
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from anomalib_metarefine.curation import run_folder
from anomalib_metarefine.curation.evidence import Evidence
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.report import write_report
from anomalib_metarefine.curation.run_folder import locked, read_run, write_together
from tests.curation.test_evidence import make_evidence
from tests.curation.test_manifest import DECISIONS, make_files, make_manifest, visible

FILES = ["evidence.npz", "manifest.csv", "report.html", "run.json"]


def write_run(out: Path, root: Path, number: int) -> None:
    """A run whose files all tell its number."""
    evidence = make_evidence()
    evidence.maps = np.full((2, 60, 60), number, np.float32)
    manifest = make_manifest(root, DECISIONS, reason=f"run <{number}>")
    manifest.run["seed"] = number
    report = lambda path: write_report(manifest, evidence, path)  # noqa: E731
    manifest.write(out, {"evidence.npz": evidence.save, "report.html": report})


def number_of_run(out: Path) -> int:
    """Raises if the files are not all there, whole and of one run."""
    manifest, evidence = Manifest.read(out), Evidence.load(out / "evidence.npz")
    read_run(out / "report.html")
    numbers = {
        manifest.run["seed"],
        *(int(text[5:-1]) for text in manifest.table.reason),
        *evidence.maps.ravel().tolist(),
    }
    assert len(numbers) == 1, numbers
    number = int(numbers.pop())
    assert f"run &lt;{number}&gt;" in (out / "report.html").read_text()
    return number


def _write_for_ever(out, root, begun, first):
    for number in range(first, first + 1000):
        write_run(out, root, number)
        begun.set()


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_eighty_kills_leave_no_damaged_and_no_mixed_result(tmp_path):
    root, out = make_files(tmp_path / "data"), tmp_path / "out"
    fork, rng = multiprocessing.get_context("fork"), random.Random(0)
    seen, interrupted = set(), 0
    for first in range(0, 80_000, 1000):
        begun = fork.Event()
        writer = fork.Process(target=_write_for_ever, args=(out, root, begun, first))
        writer.start()
        assert begun.wait(60)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        interrupted += any(path.is_dir() for path in out.iterdir())
        seen.add(number_of_run(out))
        assert visible(out) == FILES
    assert len(seen) == 80
    assert interrupted > 20  # most kills come while files are being written


@pytest.mark.parametrize("moved", range(5))
def test_a_stop_while_files_are_moved_to_their_places(tmp_path, monkeypatch, moved):
    """The moment that random kills hardly ever hit: the first file moved is the whole folder."""
    root, out = make_files(tmp_path / "data"), tmp_path / "out"
    write_run(out, root, 1)
    done = []

    def replace(self, target):
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(target)
        os.replace(self, target)  # noqa: PTH105

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write_run(out, root, 2)
    assert number_of_run(out) == (2 if moved else 1)
    assert visible(out) == FILES
    write_run(out, root, 3)
    assert number_of_run(out) == 3
    assert [path.name for path in out.iterdir() if path.is_dir()] == []


def test_a_mixed_set_is_refused(tmp_path):
    root, out = make_files(tmp_path / "data"), tmp_path / "out"
    for number in (1, 2):
        write_run(tmp_path / str(number), root, number)
    for name in FILES:
        write_run(out, root, 1)
        (out / name).write_bytes((tmp_path / "2" / name).read_bytes())
        with pytest.raises(ValueError, match="or of another run"):
            number_of_run(out)


def test_what_belongs_to_the_run_still_does_after_the_manifest_changed(tmp_path):
    root, out = make_files(tmp_path / "data"), tmp_path / "out"
    write_run(out, root, 1)
    Manifest.read(out).write(out)
    assert Evidence.load(out / "evidence.npz").paths
    make_manifest(root, DECISIONS).write(out)  # of another run
    with pytest.raises(ValueError, match="or of another run"):
        Evidence.load(out / "evidence.npz")


def test_a_failed_write_leaves_all_as_it_was(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    root, out = make_files(tmp_path / "data"), tmp_path / "out"
    write_run(out, root, 1)
    with pytest.raises(OSError, match="disk full"):
        make_manifest(root, DECISIONS).write(out, {"evidence.npz": fail})
    assert number_of_run(out) == 1
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == FILES


def _hold(out, held, release):
    with locked(out):
        held.set()
        release.wait(60)


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_WAIT_S", 0.2)
    fork = multiprocessing.get_context("fork")
    held, release = fork.Event(), fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "out", held, release))
    other.start()
    assert held.wait(60)
    message = "Another `metarefine` command is writing to .*out. Wait until"
    with pytest.raises(ValueError, match=message), locked(tmp_path / "out"):
        pass
    with pytest.raises(ValueError, match=message):
        write_together(tmp_path / "out", {}, {})
    release.set()
    other.join()
    with locked(tmp_path / "out"):
        write_together(tmp_path / "out", {"seed": 3}, {})  # what holds the lock may write
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {"seed": 3, "files": {}}


def test_a_folder_that_can_t_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="Can't write to .*file/out .*Pass a folder that can be written to"),
        locked(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="Can't write to"), locked(tmp_path / "out"):
        pass
