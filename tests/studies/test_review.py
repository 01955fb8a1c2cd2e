"""The study of reviews, on a folder whose truth is known by construction."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.run_folder import EVIDENCE_FILE
from studies.review import KEY, compare, reviewed, summarise
from tests.curation.made_up import make


@pytest.fixture
def folder(tmp_path):
    """60 images, of which the ten with the highest scores, the last ones, are dirty."""
    manifest, evidence = make(tmp_path / "images", keep=50, reject=10, review=0, files=False)
    names = [f"{row:05d}.png" for row in range(60)]
    table = manifest.table.sort_values("score").assign(image_path=names, decision="keep")
    nothing = {"paths": [], "maps": evidence.maps[:0], "nearest": [], "groups": []}
    evidence = dataclasses.replace(evidence, images=names, **nothing)
    Manifest(table, manifest.run).write(tmp_path / "out", {EVIDENCE_FILE: evidence.save})
    return tmp_path / "out"


def test_a_review_of_a_clear_order(folder):
    dirty = np.arange(60) >= 50
    row = reviewed(folder, dirty, seed=0)
    assert (row["dirty"], row["order_AUROC"], row["looks_first_order"]) == (10, 1.0, 9)
    assert row["looks_random"] == pytest.approx(9 * 61 / 11)
    assert 9 <= row["looks"] <= 20
    assert row["stop_recall"] >= 0.9
    assert row["bound_at_stop"]
    assert row["bound_always"]
    assert not (folder / "decisions.csv").exists()
    assert "100%" in summarise(pd.DataFrame([row | {"family": "toys"}]))


def test_the_bound_is_held_against_the_truth(folder, monkeypatch):
    monkeypatch.setattr("anomalib_metarefine.curation.stopping._Audit.left_at_most", lambda *_a, **_k: 0)
    row = reviewed(folder, np.arange(60) < 10, seed=0)
    assert not row["bound_at_stop"]
    assert not row["bound_always"]
    assert row["stop_recall"] < 0.9


def test_the_former_queue_is_compared_on_the_folders_it_is_known_of():
    rows = pd.DataFrame([["a", 60, 0.1, seed, 6, 12.0, 18.0, 24.0] for seed in (0, 1)])
    rows.columns = [*KEY, "dirty", "looks", "looks_first_order", "looks_random"]
    queue = pd.DataFrame([["a", 60, 0.1, 0, 30, 3]], columns=[*KEY, "looks_queue", "looks_queue_after_rule"])
    last = compare(rows, queue).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == ["all", "1", "2.0", "3.0", "4.0", "5.0", "0.5"]
