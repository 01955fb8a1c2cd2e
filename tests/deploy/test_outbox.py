import json

import pytest

from anomalib_metarefine.deploy.outbox import Outbox, Place, first_hash


def line(**record):
    return json.dumps(record).encode() + b"\n"


START, A, B, STATE = line(event="start", id="s"), line(id="a"), line(id="b"), line(event="state", monitor={})


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(START + A)
    return path


def begun(results):
    outbox = Outbox(results, "sink")
    outbox.begin()
    return outbox


def append(results, *lines):
    with results.open("ab") as file:
        file.write(b"".join(lines))


def take(outbox):
    lines, place = outbox.batch()
    if place:
        outbox.arrived(place)
    return lines


def test_gives_what_has_not_arrived_and_only_lines_with_an_id(results):
    outbox = begun(results)
    assert outbox.batch()[0] == outbox.batch()[0] == [START, A]
    assert take(outbox) == [START, A]
    append(results, STATE, b'damaged "id": "x"\n', B, b'{"id": "half')
    assert Outbox(results, "sink").batch()[0] == [B]
    assert outbox.waiting() == 2  # the damaged one counts until it has been looked at
    assert take(outbox) == [B]
    assert take(outbox) == []
    append(results, b'"}\n')
    assert take(outbox) == [line(id="half")]
    assert Outbox(results, "other").waiting() == 0  # until it begins
    assert begun(results).waiting() == 0


def test_batches_are_bounded(results):
    append(results, *(line(id=str(i)) for i in range(250)))
    outbox = begun(results)
    assert [len(take(outbox)) for _ in range(4)] == [100, 100, 52, 0]


def test_lines_of_before_a_copy_come_again(results):
    outbox = begun(results)
    take(outbox)
    append(results, line(event="again", lines=[{"id": str(i), "path": "a"} for i in range(120)]), B)
    assert take(outbox) == [line(id=str(i), path="a") for i in range(120)]  # whole: its place is behind all of them
    assert take(outbox) == [B]


def test_lines_that_a_power_failure_took_do_not_hide_those_that_follow(results):
    append(results, B)
    take(begun(results))
    results.write_bytes(START + A)
    again = Outbox(results, "sink")  # at the start, when nothing was appended yet
    append(results, line(id="c"), line(id="d"))
    assert take(again) == [line(id="c"), line(id="d")]


def renamed(results, name, *lines):
    previous = first_hash(results)
    results.rename(results.with_name(name))
    results.write_bytes(line(event="start", id=name, previous=previous) + b"".join(lines))


def test_goes_on_through_renamed_results(results):
    outbox = begun(results)
    take(outbox)
    append(results, B)
    renamed(results, "r-2.jsonl", line(id="c"))
    renamed(results, "old.jsonl", line(id="d"))
    assert [json.loads(one)["id"] for one in take(outbox)] == ["b", "r-2.jsonl", "c", "old.jsonl", "d"]
    assert not outbox.missing


@pytest.mark.parametrize("gone", ["r-2.jsonl", "old.jsonl"])
def test_says_what_is_not_there_any_more(results, gone):
    outbox = begun(results)
    renamed(results, "r-2.jsonl", line(id="c"))
    renamed(results, "old.jsonl", line(id="d"))
    lost = results.with_name(gone)
    name = first_hash(lost)
    lost.unlink()
    assert take(outbox)[-1] == line(id="d")
    assert outbox.missing == {name}


def test_waits_while_the_new_file_has_no_first_line(results):
    outbox = begun(results)
    take(outbox)
    results.rename(results.with_name("old.jsonl"))
    results.write_bytes(b'{"event": "sta')
    assert (take(outbox), outbox.missing) == ([], set())


def test_new_results_that_know_nothing_of_the_old(results):
    outbox = begun(results)
    results.rename(results.with_name("old.jsonl"))
    results.write_bytes(line(event="start", id="t"))
    assert take(outbox) == [START, A, line(event="start", id="t")]
    assert not outbox.missing


@pytest.mark.parametrize("content", ["", "[]", '{"file": "x"}', "\0\0"])
def test_a_place_that_can_not_be_read_means_all_again(results, content):
    results.with_name("r.jsonl.sink").write_text(content)
    outbox = begun(results)
    assert outbox.damaged
    assert take(outbox) == [START, A]


def test_the_place_is_written_down(results):
    take(begun(results))
    saved = json.loads(results.with_name("r.jsonl.sink").read_text())
    assert Place(**saved) == (first_hash(results), len(START + A))
