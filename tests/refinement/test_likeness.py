import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from anomalib_metarefine.features.embedding import Whitening
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.refinement.fitting import Images
from anomalib_metarefine.refinement.likeness import keep_deviations
from anomalib_metarefine.refinement.likeness import likeness as likenesses

COUNT = 60


def likeness(features, scores, answers=None):
    """By one score, of features that shards have."""
    store = FeatureStore()
    store.add([str(i) for i in range(len(scores))], torch.zeros(len(scores), 1, 1))
    store.keep(deviations=features)
    ((verdict, trust),) = likenesses(store, [scores], answers)
    return verdict, trust


def deviations(patches, distances, kept, variants=None):
    store, channels = FeatureStore(), patches.shape[2]
    store.add([str(i) for i in range(len(patches))], patches)
    store.keep(distances=distances.numpy(), whitened=patches.numpy())
    images = Images(store, Whitening(torch.zeros(channels), torch.eye(channels)), (1, patches.shape[1]))
    keep_deviations(images, kept, np.zeros(len(kept), dtype=int) if variants is None else variants)
    return store.read("deviations")


@pytest.fixture
def images():
    """Features and scores: 12 images share a deviation; 8 of them score high, and so do 4 others, like none."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(COUNT, 8))
    scores = generator.normal(size=COUNT)
    features[:12, 2] += 6
    scores[:8] += 8
    scores[12:16] += 8
    return features, scores


def test_what_is_unusual_like_other_suspicious_images_is_suspicious(images):
    verdict, trust = likeness(*images)
    assert verdict[8:12].mean() > verdict[12:].max()  # they score like the rest, and look like 0 to 7
    assert 0 < trust <= 1


def test_the_verdict_on_an_image_is_that_of_a_ridge_regression_on_the_others(images):
    features, scores = images
    standard = (features - features.mean(0)) / features.std(0)
    suspicion = ((scores.argsort().argsort() / (COUNT - 1) - 0.8) / 0.2).clip(0, 1)
    suspicion -= suspicion.mean()
    verdict, _ = likeness(features, scores)
    for image in range(0, COUNT, 7):
        others = np.arange(COUNT) != image
        model = Ridge(alpha=10 * COUNT, fit_intercept=False).fit(standard[others], suspicion[others])
        assert verdict[image] == pytest.approx(model.predict(standard[[image]])[0])


def test_answers_teach(images):
    features, scores = images
    alone, trust = likeness(features, scores)
    told, more = likeness(features, scores, {8: False, 9: False, 12: True, 13: True})
    assert more > trust
    assert (told[10:12] > alone[10:12]).all()  # of the same kind as 8 and 9, and not asked about


def test_trusted_where_others_explain_and_not_otherwise(images):
    features, scores = images
    assert likeness(features, features[:, 2])[1] > 0.8
    assert likeness(np.column_stack([features, 0.01 * scores]), scores)[1] > likeness(features, scores)[1]
    assert likeness(np.random.default_rng(1).normal(size=(COUNT, 8)), scores)[1] < 0.05
    assert likeness(np.ones((COUNT, 8)), scores)[1] == 0
    assert likeness(features, np.ones(COUNT))[1] == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_do_no_harm(count):
    verdict, trust = likeness(np.arange(4.0 * count).reshape(count, 4), np.arange(float(count)))
    assert np.isfinite(verdict).all()
    assert 0 <= trust <= 1


@given(st.permutations(range(COUNT)), st.floats(0.1, 10), st.floats(-5, 5))
def test_neither_order_nor_units_matter(order, scale, shift):
    generator = np.random.default_rng(2)
    features, scores = generator.normal(size=(COUNT, 5)), generator.normal(size=COUNT)
    verdict, trust = likeness(features, scores)
    again, same = likeness(scale * features[order] + shift, np.exp(scores[order]))
    np.testing.assert_allclose(again, verdict[order], atol=1e-9)
    assert same == pytest.approx(trust)


def test_deviations_are_weighted_means_of_what_differs_from_the_usual_patch():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(7, 9, 3, generator=generator)
    distances = torch.rand(7, 9, generator=generator)
    distances[6] = 1  # nothing stands out
    kept = np.arange(7) != 2
    result = deviations(patches, distances, kept)
    usual = patches[torch.from_numpy(kept)].mean(0)
    for image in range(6):
        excess = (distances[image] - distances[image].median()).clamp_min(0) ** 2
        expected = (excess[:, None] * (patches[image] - usual)).sum(0) / excess.sum()
        np.testing.assert_allclose(result[image], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(result[6], 0)


def test_deviations_are_from_the_mean_of_the_own_variant():
    generator = torch.Generator().manual_seed(0)
    patches, distances = torch.randn(9, 5, 3, generator=generator), torch.rand(9, 5, generator=generator)
    variants, kept = np.array([0, 0, 1, 1, 0, 1, 0, 0, 2]), np.array([True] * 7 + [False] * 2)
    found = deviations(patches, distances, kept, variants)
    for variant in (0, 1):
        own = variants == variant
        part = deviations(patches[own], distances[own], kept[own])
        np.testing.assert_allclose(found[own], part, atol=1e-6)
    everyone = deviations(patches, distances, kept)
    np.testing.assert_allclose(found[8], everyone[8], atol=1e-6)  # nothing of its own variant is kept
