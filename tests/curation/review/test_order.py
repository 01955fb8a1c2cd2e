"""The order after answers."""

import time

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.curation.review.order import directions, kernel_features, reorder
from anomalib_metarefine.curation.stopping import forecast


@pytest.fixture
def kinds():
    """60 images of three kinds, told apart by their features but not by their scores."""
    rng = np.random.default_rng(0)
    kind = np.arange(60) % 3
    features = np.eye(3)[kind] @ rng.normal(size=(3, 16)) * 3 + rng.normal(size=(60, 16))
    return kind, rng.normal(size=60), features


def test_without_answers_the_scores_rule(kinds):
    _, scores, features = kinds
    kernel = kernel_features(directions(features))
    scores[3] = np.nan
    ranks = rankdata(np.nan_to_num(scores, nan=-np.inf))
    assert (rankdata(reorder(scores, kernel, {})) == ranks).all()
    assert (rankdata(reorder(scores, None, {1: True, 2: False})) == ranks).all()


def test_look_alikes_of_a_dirty_image_come_next(kinds):
    kind, scores, features = kinds
    values = reorder(scores, kernel_features(directions(features)), {i: bool(kind[i] == 0) for i in range(12)})
    rest = np.arange(12, 60)
    before, after = (roc_auc_score(kind[rest] == 0, order[rest]) for order in (scores, values))
    assert before < 0.6
    assert after > 0.8


def test_an_images_own_answer_does_not_move_it(kinds):
    kind, scores, features = kinds
    kernel, answers = kernel_features(directions(features)), {i: bool(kind[i] == 0) for i in range(20)}
    values = reorder(scores, kernel, answers)
    for i in range(20):
        others = {other: dirty for other, dirty in answers.items() if other != i}
        assert values[i] == pytest.approx(reorder(scores, kernel, others)[i], abs=1e-3)


def test_the_kernel_is_exact_for_few_images_and_near_for_many():
    rng = np.random.default_rng(0)
    for count, error in ((200, 1e-4), (900, 0.02)):
        features = rng.normal(size=(count, 8))
        x = features - np.median(features, axis=0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        rows = kernel_features(directions(features))
        assert np.abs(rows @ rows.T - np.exp(2 * (x @ x.T - 1))).mean() < error


def test_thousands_of_images_are_ordered_between_two_pages():
    rng = np.random.default_rng(0)
    kernel, scores = kernel_features(directions(rng.normal(size=(5000, 152)).astype(np.float16))), rng.normal(size=5000)
    answers = {i: bool(i % 9 == 0) for i in range(500)}
    forecast(reorder(scores, kernel, answers), answers)
    begin = time.perf_counter()
    for _ in range(3):
        forecast(reorder(scores, kernel, answers), answers)
    assert (time.perf_counter() - begin) / 3 < 0.5  # 0.05 s alone; the machine may be busy
