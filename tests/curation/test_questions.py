import pytest

from anomalib_metarefine.curation.questions import template
from tests.curation.test_decisions import NAMES, VERDICTS
from tests.curation.test_manifest import make_manifest


@pytest.fixture
def manifest(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes([i]))
    return make_manifest(tmp_path, dict(zip(NAMES, VERDICTS, strict=True)))


def test_asks_about_the_review_queue_worst_first(manifest):
    table = template(manifest)
    assert table.image_path.tolist() == ["3.png", "2.png"]
    assert table.decision.tolist() == ["", ""]
    assert table.decision_so_far.tolist() == ["review", "review"]


def test_with_a_budget_the_highest_scores_are_asked_about_whatever_was_decided(manifest):
    by_score = manifest.table.sort_values("score", ascending=False).image_path.tolist()
    assert template(manifest, 3).image_path.tolist() == by_score[:3]
    assert template(manifest, 100).image_path.tolist() == by_score


def test_not_about_what_is_known(manifest):
    worst = manifest.table.score.idxmax()
    manifest.table.loc[worst, "decided_by"] = "user"
    assert manifest.table.image_path[worst] not in template(manifest, 3).image_path.tolist()
    manifest.table["decided_by"] = "unreadable"
    assert template(manifest, 3).empty
    with pytest.raises(ValueError, match="at least 1 image, found 0"):
        template(manifest, 0)
