"""The page of a line's decisions over time."""

import json
import re

import numpy as np
import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.deploy.history import read_results, write_history


def results(path, counts=(600, 400), drift=True):
    """Two models one after the other; the second alarms once, and the line drifts under it."""
    rng = np.random.default_rng(0)
    lines = []
    for number, count in enumerate(counts):
        lines.append({"event": "start", "time": f"2026-05-0{number + 1}T08:00:00Z", "model": f"{number}model<b>"})
        lines.append({"event": "start", "time": "2026-05-09T08:00:00Z", "model": f"{number}model<b>"})  # a restart
        for i in range(count):
            score = 9.0 if number and i == 7 else float(rng.normal(2, 0.1))
            decision = "anomalous" if score > 3 + number else "normal"
            image = {"raw_score": score, "threshold": 3.0 + number, "decision": decision}
            lines.append({"path": f"{number}{i}.png", "sha256": "", **image})
    if drift:
        state = {"drifted": True, "direction": "up", "since": 7, "images": 100, "quartiles": [1, 2, 3], "count": 9}
        lines.append({"event": "drift", "time": "2026-05-02T09:00:00Z", **state})
    lines.append({"path": "torn.png", "decision": None, "error": "the file is empty"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half a li')
    return path


def test_each_model_has_its_row_and_each_event_its_line(tmp_path):
    page = write_history(results(tmp_path / "line7.jsonl"), tmp_path / "page.html").read_text()
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><td>.*?</tr>", page)]
    assert [(row[1], row[2], row[3], row[6]) for row in rows] == [
        ("0model&lt;b&gt;", "600", "0", "3"), ("1model&lt;b&gt;", "400", "1", "4"),
    ]  # fmt: skip
    assert "1,000 images, 1 unreadable" in page
    assert page.count("begins, at image") == 2
    assert "begins, at image 601" in page
    assert "scores have drifted up since image 7" in page
    assert page.count("stroke-dasharray") == 1
    assert page.count('stroke="var(--anomalous)"') == 1


def test_the_page_needs_nothing_else_and_takes_nothing_for_markup(tmp_path):
    page = write_history(results(tmp_path / "a&b.jsonl"), tmp_path / "page.html").read_text()
    assert not re.search(r"https?://|<script|src=(?!\"data:)", page.replace("http-equiv", ""))
    assert "model<b>" not in page
    assert "History of a&amp;b.jsonl" in page


def test_a_long_line_is_no_longer_a_page(tmp_path):
    short, long = (
        write_history(results(tmp_path / f"{n}.jsonl", (n, n)), tmp_path / "page.html").stat().st_size
        for n in (500, 5000)
    )
    assert long < 1.2 * short


def test_the_scores_drawn_lie_within_the_drawing(tmp_path):
    page = write_history(results(tmp_path / "line.jsonl"), tmp_path / "page.html").read_text()
    ys = [float(y) for points in re.findall(r'points="(.*?)"', page) for y in re.findall(r",([\d.]+)", points)]
    assert len(set(ys)) == 2
    assert all(0 < y < 320 for y in ys)


def test_command(tmp_path, capsys):
    file = results(tmp_path / "line.jsonl")
    assert main(["history", str(file)]) == 0
    assert (tmp_path / "line.html").is_file()
    (tmp_path / "other.txt").write_text("something else\n")
    assert main(["history", str(tmp_path / "other.txt")]) == 2
    assert "holds no results of `metarefine watch`" in capsys.readouterr().err


def test_damaged_lines_are_left_out(tmp_path):
    assert all(isinstance(record, dict) for record in read_results(results(tmp_path / "line.jsonl")))
    with pytest.raises(FileNotFoundError):
        list(read_results(tmp_path / "none"))
