"""Every figure must be anomalib's own."""

import numpy as np
import pytest
import torch
from anomalib import metrics as upstream
from anomalib.data import ImageBatch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.benchmark.metrics import ScoreEvaluator, figures, pixel_figures

CURVES = {"AUROC": upstream.AUROC, "AUPR": upstream.AUPR, "F1Max": upstream.F1Max}


def figure(metric_class, scores, labels, **settings):
    metric = metric_class(fields=["pred_score", "gt_label"], **settings)
    batch = type("Batch", (), {"pred_score": torch.as_tensor(scores), "gt_label": torch.as_tensor(labels)})
    metric.update(batch)
    return float(metric.compute())


def maps(seed, images, size, decimals=6):
    """Noise; the first images have two or three bright squares each, the others none."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 1, (images, *size)).astype(np.float32)
    masks = np.zeros(scores.shape, dtype=bool)
    for image in range(images // 2):
        for _ in range(3):
            y, x = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
            masks[image, y : y + 6, x : x + rng.integers(1, 8)] = True
    scores[masks] += 1.5
    return scores.round(decimals), masks


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40))
def test_figures_are_anomalibs_ties_included(rows):
    scores, labels = np.array([row[0] / 12 for row in rows]), np.array([row[1] for row in rows])
    found = figures(scores, labels)
    if labels.all() or not labels.any():
        assert np.isnan(list(found.values())).all()
        return
    for name, metric_class in CURVES.items():
        assert found[name] == pytest.approx(figure(metric_class, scores, labels), abs=1e-6), name


@pytest.mark.parametrize("decimals", [6, 0])
def test_pixel_figures_are_anomalibs(decimals):
    scores, masks = maps(0, 8, (40, 56), decimals)
    found = pixel_figures(scores, masks)
    squashed = 1 / (1 + np.exp(-scores.astype(np.float64)))  # or torchmetrics would, in single precision
    for name, metric_class in CURVES.items():
        assert found[name] == pytest.approx(figure(metric_class, squashed.ravel(), masks.ravel()), abs=1e-6), name
    assert found["AUPRO"] == pytest.approx(figure(upstream.AUPRO, scores, masks), abs=1e-5)
    assert 0.3 < found["AUPRO"] < 0.9


@pytest.mark.parametrize(("seed", "decimals"), [(0, 6), (1, 6), (1, 1)])
def test_per_image_overlap_is_anomalibs(seed, decimals):
    scores, masks = maps(seed, 8, (192, 192), decimals)
    scores[masks] += 2
    expected = figure(upstream.AUPIMO, scores, masks, num_thresholds=100_000)
    assert 0.2 < expected < 0.8
    assert pixel_figures(scores, masks)["AUPIMO"] == pytest.approx(expected, abs=2e-3)


def test_per_image_overlap_needs_normal_pixels():
    scores, masks = maps(0, 2, (64, 64))  # one normal image of 4,096 pixels: no rate of 1e-5
    found = pixel_figures(scores, masks)
    assert np.isnan(found.pop("AUPIMO"))
    assert np.isfinite(list(found.values())).all()
    with pytest.raises((RuntimeError, ValueError)):
        figure(upstream.AUPIMO, scores, masks)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1e-3, 1.0, 1e6]), st.sampled_from([0.0, -5.0, 1e4]))
def test_figures_depend_on_the_order_alone(scale, shift):
    scores, masks = maps(3, 4, (24, 24), decimals=0)
    moved = (scores.astype(np.float64) * scale + shift).astype(np.float64)
    assert pixel_figures(moved, masks) == pytest.approx(pixel_figures(scores, masks), nan_ok=True)


def batch(scores, labels, anomaly_map=None, mask=None):
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 8, 8),
        pred_score=torch.tensor(scores),
        gt_label=torch.tensor(labels),
        anomaly_map=anomaly_map,
        gt_mask=mask,
    )


def evaluate(*batches):
    evaluator = ScoreEvaluator()
    evaluator.on_test_epoch_start(None, None)
    for index, one in enumerate(batches):
        evaluator.on_test_batch_end(None, None, None, one, index)
    evaluator.on_test_epoch_end(None, None)
    return evaluator


def test_large_scores_of_several_batches():
    """torchmetrics would squash each batch for itself, and all of these to 1."""
    found = evaluate(batch([900.0, 1000.0], [0, 1]), batch([0.5, 1000.1], [0, 1])).figures
    assert found["image_AUROC"] == found["image_AUPR"] == found["image_F1Max"] == 1


def test_no_masks_no_pixel_figures():
    found = evaluate(batch([0.1, 0.2], [0, 1], anomaly_map=torch.rand(2, 1, 8, 8))).figures
    pixel = {name: value for name, value in found.items() if name.startswith("pixel_")}
    assert set(pixel) == {"pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_AUPIMO", "pixel_F1Max"}
    assert np.isnan(list(pixel.values())).all()
    without_maps = evaluate(batch([0.1, 0.2], [0, 1], mask=torch.ones(2, 8, 8, dtype=torch.bool))).figures
    assert np.isnan(without_maps["pixel_AUROC"])


def test_masks_and_maps_of_a_batch():
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[1, 2:4, 2:4] = True
    evaluator = evaluate(batch([0.1, 0.2], [0, 1], anomaly_map=mask.float().unsqueeze(1) * 50, mask=mask))
    assert evaluator.figures["pixel_AUROC"] == evaluator.figures["pixel_F1Max"] == 1
    assert evaluator.figures["pixel_AUPRO"] == pytest.approx(1)


def test_scores_that_are_not_numbers():
    with pytest.raises(ValueError, match="1 of 2 test images a score that is not a number"):
        evaluate(batch([float("nan"), 0.2], [0, 1]))
