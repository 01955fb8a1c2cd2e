"""The table that a person fills in without a browser."""

import pytest

from anomalib_metarefine.curation.decisions import decide
from anomalib_metarefine.curation.questions import template
from tests.curation.test_decisions import NAMES, VERDICTS, answers
from tests.curation.test_manifest import make_manifest

SCORES = [0.5, 1.5, 2.5, 3.5, 3.0, 9.0]


@pytest.fixture
def manifest(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes([i]))
    return make_manifest(tmp_path, dict(zip(NAMES, VERDICTS, strict=True)), score=SCORES)


def test_asks_about_the_images_for_review_worst_first(manifest):
    table = template(manifest)
    assert table.image_path.tolist() == ["3.png", "2.png"]
    assert table.decision.tolist() == ["", ""]
    assert table.decision_so_far.tolist() == ["review", "review"]
    assert table.sha256.tolist() == manifest.table.sha256[[3, 2]].tolist()


def test_a_budget_takes_the_highest_scores_whatever_the_rule_said(manifest):
    table = template(manifest, 4)
    assert table.image_path.tolist() == ["5.png", "3.png", "4.png", "2.png"]
    assert table.decision_so_far.tolist() == ["reject", "review", "reject", "review"]
    assert len(template(manifest, 100)) == 6


def test_not_about_what_is_known(manifest):
    decided = decide(manifest, answers(_5="keep"))
    assert template(decided, 1).image_path.tolist() == ["3.png"]
    decided.table.loc[3, ["decided_by", "decision"]] = ["unreadable", "reject"]
    assert template(decided, 1).image_path.tolist() == ["4.png"]
    decided.table["decided_by"] = "user"
    assert template(decided, 3).empty


def test_a_budget_of_nothing_is_refused(manifest):
    with pytest.raises(ValueError, match="at least 1 image, found 0"):
        template(manifest, 0)
