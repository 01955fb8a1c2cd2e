"""Results of a line, opened for review."""

import json

import pandas as pd
import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.curation.line_results import manifest_of
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.review.finish import next_commands
from anomalib_metarefine.images.reading import file_hash
from tests.conftest import plate


@pytest.fixture
def lines(tmp_path):
    found = [{"event": "start", "model": "a"}, {"path": "torn.png", "decision": None}]
    for i, (score, decision) in enumerate([(1.0, "normal"), (1.2, "normal"), (2.5, "uncertain"), (4.0, "anomalous")]):
        path = tmp_path / "belt" / f"day{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plate(i).save(path)
        about = {"path": str(path), "sha256": file_hash(path), "raw_score": score, "threshold": 3.0}
        found.append({**about, "decision": decision})
    return found


def test_what_the_line_decided_is_the_decision(lines, tmp_path):
    again = {**lines[2], "raw_score": 9.0, "decision": "anomalous"}
    table = manifest_of([*lines, again]).table.set_index("image_path")
    assert table.decision.to_dict() == {
        "day0/0.png": "reject", "day0/2.png": "review", "day1/1.png": "keep", "day1/3.png": "reject",
    }  # fmt: skip
    assert table.score.is_monotonic_increasing == table.fence_distance.is_monotonic_increasing
    assert (table.fence_distance > 0).to_dict() == (table.decision == "reject").to_dict()
    assert table.reason["day1/3.png"] == "score 4, threshold 3"
    with pytest.raises(ValueError, match="nothing to review"):
        manifest_of(lines[:2])


def test_a_table_to_fill_in_comes_back_as_verdicts(lines, tmp_path):
    results = tmp_path / "line7.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = tmp_path / "questions.csv"
    assert main(["review", str(results), "--out", str(questions)]) == 0
    manifest = Manifest.read(tmp_path / "line7-review")
    assert manifest.root == tmp_path / "belt"
    assert manifest.counts == {"keep": 2, "reject": 1, "review": 1}
    (command,) = next_commands(tmp_path / "line7-review")
    assert command.startswith(f"metarefine update CKPT --verdicts {tmp_path}/line7-review/decisions.csv --results ")
    asked = pd.read_csv(questions)
    assert set(asked.sha256) <= {line["sha256"] for line in lines if "raw_score" in line}
    assert main(["review", str(results), "--out", str(tmp_path / "again.csv")]) == 0
