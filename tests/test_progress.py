import sys
import time

import pytest

from anomalib_metarefine import progress
from anomalib_metarefine.progress import progress_bars, track


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "_EVERY_S", 0.05)


def test_lines_in_a_pipe(often, capsys):
    with progress_bars(enabled=True) as bars:
        task = bars.add_task("embedding images", total=10)
        bars.update(task, advance=4)
        time.sleep(0.3)
    told = capsys.readouterr()
    assert told.out == ""  # results only
    lines = told.err.splitlines()
    assert lines[0].startswith("embedding images: 4 of 10, ")
    assert len(lines) >= 2  # also while nothing moves on
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


def test_silence_is_silence(often, capsys):
    with progress_bars(enabled=False) as bars:
        bars.add_task("embedding images", total=10)
        time.sleep(0.15)
    assert list(track("abc", "letters", enabled=False)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_track_counts(often, capsys):
    for _ in track("ab", "letters"):
        time.sleep(0.15)
    assert "letters: 1 of 2, " in capsys.readouterr().err


def test_bars_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track("ab", "letters")) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err
