"""The order after answers."""

import time

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.curation.review.order import reorder


@pytest.fixture
def kinds():
    """60 images of three kinds, told apart by their features but not by their scores."""
    rng = np.random.default_rng(0)
    kind = np.arange(60) % 3
    features = np.eye(3)[kind] @ rng.normal(size=(3, 16)) * 3 + rng.normal(size=(60, 16))
    return kind, rng.normal(size=60), features


def test_without_answers_the_scores_rule(kinds):
    _, scores, features = kinds
    scores[3] = np.nan
    ranks = rankdata(np.nan_to_num(scores, nan=-np.inf))
    assert (rankdata(reorder(scores, features, {}).values) == ranks).all()
    assert (rankdata(reorder(scores, None, {1: True, 2: False}).values) == ranks).all()


def test_look_alikes_of_a_dirty_image_come_next(kinds):
    kind, scores, features = kinds
    values = reorder(scores, features, {i: bool(kind[i] == 0) for i in range(12)}).values
    rest = np.arange(12, 60)
    before, after = (roc_auc_score(kind[rest] == 0, order[rest]) for order in (scores, values))
    assert before < 0.6
    assert after > 0.8


def test_the_number_left_is_near_the_truth(kinds):
    kind, scores, features = kinds
    answers = {i: bool(kind[i] == 0) for i in range(30)}
    assert reorder(scores, features, answers).about == pytest.approx(10, abs=4)
    assert reorder(scores, features, dict.fromkeys(range(30), False)).about == 0.5
    assert reorder(scores, features, dict.fromkeys(range(60), False)).about == 0


def test_an_images_own_answer_does_not_tell_what_is_left():
    rng = np.random.default_rng(0)
    features, scores = rng.normal(size=(200, 64)), rng.normal(size=200)
    answers = {i: bool(i % 5 == 0) for i in range(100)}  # nothing tells: a fifth of the others is dirty too
    assert reorder(scores, features, answers).about == pytest.approx(20, abs=8)


def test_thousands_of_images_are_ordered_between_two_pages():
    rng = np.random.default_rng(0)
    features, scores = rng.normal(size=(5000, 256)).astype(np.float16), rng.normal(size=5000)
    answers = {i: bool(i % 9 == 0) for i in range(500)}
    reorder(scores, features, answers)
    begin = time.perf_counter()
    for _ in range(3):
        reorder(scores, features, answers)
    assert (time.perf_counter() - begin) / 3 < 0.5  # 0.05 s alone; the machine may be busy
