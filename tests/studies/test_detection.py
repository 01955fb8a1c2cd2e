import math

import numpy as np
import pandas as pd
import pytest

from anomalib_metarefine.refinement import engine as fitting
from anomalib_metarefine.refinement.posterior import estimate_contamination
from studies import detection
from studies.detection import main, summarise
from tests.conftest import part

pytestmark = pytest.mark.usefixtures("short_chains")


@pytest.fixture
def many_parts(parts):
    """More good parts than the fixture has, so that there is a majority to speak of."""
    rng = np.random.default_rng(1)
    for i in range(24, 40):
        part(rng).save(parts / f"train/good/{i:03d}.png")
    return parts


def test_finds_the_dirty_images_and_goes_on_where_it_stopped(many_parts, tmp_path, capsys):
    out = tmp_path / "detection.csv"
    arguments = ["--out", str(out), "--data", f"{many_parts}@96x96:40:parts", "--seeds", "0"]
    assert main([*arguments, "--contamination", "0", "0.1"]) == 0
    rows = pd.read_csv(out)
    assert rows.dirty.tolist() == [0, 4]
    assert (rows.recall[1], rows.precision[1], rows.rejected[0]) == (1, 1, 0)
    assert rows.last_AUROC[1] == 1
    assert (rows.low - 0.005 <= rows.dirty / rows.images).all()
    assert rows.low[1] > 0.03
    capsys.readouterr()

    assert main([*arguments, "--contamination", "0", "0.1", "--rules", "auto", "share:0.1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # only what was missing
    rows = pd.read_csv(out)
    assert rows.rule.tolist() == ["auto", "auto", "share:0.1", "share:0.1"]
    assert rows.rejected.tolist()[2:] == [4, 4]


def test_a_person_who_looks_corrects_the_estimate(many_parts, tmp_path, monkeypatch):
    second_scales = []

    def estimate(scores, known, further):
        second_scales.extend(further)
        return estimate_contamination(scores, 0, known, further)

    monkeypatch.setattr(detection, "estimate_contamination", estimate)
    monkeypatch.setattr(fitting, "likeness", lambda _features, scores, _known: (scores, 1.0))  # trusted
    out = tmp_path / "detection.csv"
    arguments = ["--data", f"{many_parts}@96x96:40:parts", "--seeds", "0", "--contamination", "0.1"]
    # A rule that rejects two of the four leaves the other two to the person.
    assert main([*arguments, "--out", str(out), "--rules", "count:2", "--looks", "0", "4"]) == 0
    alone, told = pd.read_csv(out).to_dict("records")
    assert (alone["looks"], alone["asked_dirty"], alone["recall"]) == (0, 0, 0.5)
    assert (told["looks"], told["asked_dirty"]) == (4, 2)
    assert told["recall"] > alone["recall"]
    assert told["high"] - told["low"] < alone["high"] - alone["low"]
    assert [len(scale) for scale in second_scales] == [40] * 3  # once alone; told, before and after


def test_says_what_cannot_be_had(parts, tmp_path, capsys):
    out = tmp_path / "detection.csv"
    assert main(["--out", str(out), "--data", f"{parts}:24:parts", "--contamination", "0.5", "--seeds", "0"]) == 0
    assert "contamination 0.5, seed 0 left out" in capsys.readouterr().out
    assert main(["--out", str(out), "--data", str(tmp_path / "nowhere")]) == 2


def test_summary():
    row = {
        "data": "a",
        "contamination": 0.1,
        "score": "neighbours",
        "rule": "auto",
        "looks": 0,
        "images": 100,
        "dirty": 10,
    }
    first = row | {"seed": 0, "rejected": 8, "precision": 1.0, "recall": 0.8, "last_AUROC": 0.9}
    second = row | {"seed": 1, "rejected": 0, "precision": math.nan, "recall": 0.0, "last_AUROC": 0.7}
    estimate = {"estimate": 0.1, "low": 0.05, "high": 0.2}
    text = summarise(pd.DataFrame([first | estimate, second | estimate | {"low": 0.15}]))
    assert "| a | neighbours | `auto` | 0 | 10% | 4.0 (8, 0) | 1.00 | 0.400 ± 0.566 | 0.800 ± 0.141 |" in text
    assert "1 of 2 |" in text
    assert "`auto`, 0 looks: the 90 % interval held the truth in 50% of the training sets" in text
