import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_metarefine.deploy.journal import Journal, encode

START = {"event": "start"}


def lines(journal):
    return list(journal.records())


def write(path, *records):
    journal = Journal(path)
    journal.append(*records)
    journal.close()


def test_goes_on(tmp_path):
    write(tmp_path / "new" / "r.jsonl", START, {"path": "a\nb\udcff.png"})
    journal = Journal(tmp_path / "new" / "r.jsonl")
    journal.append({"path": "c"})
    assert lines(journal) == [START, {"path": "a\nb\udcff.png"}, {"path": "c"}]
    assert (journal.cut, journal.damaged) == (0, 0)
    journal.close()


@given(cut=st.integers(0, 500))
def test_a_torn_line_is_cut_off(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "r.jsonl"
    records = [START, *({"path": f"{i}", "score": i / 7} for i in range(9))]
    whole = encode(*records)[: len(encode(*records)) - cut]
    path.write_bytes(whole)
    journal = Journal(path)
    kept = whole.count(b"\n")
    assert lines(journal) == records[:kept]
    journal.append({"path": "next"})
    assert lines(journal) == [*records[:kept], {"path": "next"}]
    assert journal.cut == len(whole) - len(encode(*records[:kept]))
    journal.close()


def test_a_long_torn_line(tmp_path):
    """Longer than what is read at a time."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(encode(START) + b"x" * 200_000)
    journal = Journal(path)
    assert lines(journal) == [START]
    journal.close()


def test_zeros_of_a_power_failure_are_skipped(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(encode(START) + b"\0" * 50 + b"\n" + encode({"path": "a"}))
    journal = Journal(path)
    assert lines(journal) == [START, {"path": "a"}]
    assert journal.damaged == 1
    journal.close()


@pytest.mark.parametrize("content", ['{\n "schema": 1}', "image_path,score\na,1\n", '{"path": 1}\n'])
def test_other_files_are_left_alone(tmp_path, content):
    path = tmp_path / "other"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds something else"):
        Journal(path)
    assert path.read_text() == content
    path.write_text("")
    Journal(path).close()  # the lock was given back


def test_one_writer(tmp_path):
    path = tmp_path / "r.jsonl"
    code = "import sys, pathlib, anomalib_metarefine.deploy.journal as j; j.Journal(pathlib.Path(sys.argv[1]))"
    journal = Journal(path)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert "Another `metarefine watch` writes to" in done.stderr
    journal.close()
    subprocess.run([sys.executable, "-c", code, path], check=True)


def test_no_line_is_written_that_json_can_not_hold(tmp_path):
    journal = Journal(tmp_path / "r.jsonl")
    with pytest.raises(ValueError, match="Out of range"):
        journal.append({"score": float("nan")})
    journal.close()
    assert (tmp_path / "r.jsonl").read_bytes() == b""


def test_each_record_is_a_line():
    block = encode({"a": "x\ny"}, {"b": 0.1 + 0.2})
    assert [json.loads(line) for line in block.splitlines()] == [{"a": "x\ny"}, {"b": 0.1 + 0.2}]


def test_one_writer_through_a_link_too(tmp_path):
    path, link = tmp_path / "r.jsonl", tmp_path / "link.jsonl"
    journal = Journal(path)
    link.symlink_to(path)
    with pytest.raises(ValueError, match="Another `metarefine watch` writes to"):
        Journal(link)
    journal.close()


def rotated(path):
    """What log rotation by copying and emptying leaves: the copy's lines, and whatever comes after."""
    copy = path.read_bytes()
    return copy, lambda: path.open("r+b").truncate(0)


def begin_anew(journal):
    assert journal.renewed()
    journal.append(START)


def again(path):
    return [line for record in map(json.loads, path.read_text().splitlines()) for line in record.get("lines", [])]


def test_a_line_between_copying_and_emptying_stands_in_the_new_file(tmp_path):
    path = tmp_path / "r.jsonl"
    journal = Journal(path)
    journal.append(START, {"path": "a"}, {"event": "state", "monitor": {}})
    copy, empty = rotated(path)
    assert not journal.renewed()
    journal.append({"path": "b"})
    empty()
    begin_anew(journal)
    journal.append({"path": "c"})
    assert b'"b"' not in copy
    assert again(path) == [{"path": "a"}, {"path": "b"}]
    assert not journal.renewed()
    assert [record.get("event") for record in journal.records()] == ["start", "again", None]
    journal.close()


@pytest.mark.parametrize("before", [2, 200])
def test_emptied_between_the_look_and_the_line(tmp_path, before):
    """The line is then the first of the file, which would be taken for somebody else's at the next start."""
    path = tmp_path / "r.jsonl"
    journal = Journal(path)
    journal.append(START, {"path": "a" * before})
    _, empty = rotated(path)
    assert not journal.renewed()
    empty()
    journal.append({"path": "b" * 100})
    begin_anew(journal)
    assert again(path) == [{"path": "a" * before}, {"path": "b" * 100}]
    journal.close()
    goes_on = Journal(path)
    assert [record["event"] for record in goes_on.records()] == ["start", "again"]
    goes_on.close()


def test_lines_of_a_renamed_file_do_not_stand_twice(tmp_path):
    path = tmp_path / "r.jsonl"
    journal = Journal(path)
    journal.append(START, {"path": "a"})
    path.rename(tmp_path / "old")
    begin_anew(journal)
    assert list(journal.records()) == [START]
    journal.close()
