import numpy as np
import pytest
import torch

from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.features.store import FeatureStore
from studies.episodic import aggregate, draw_supports, support_distances


def test_supports_have_their_size_and_are_different():
    supports = draw_supports(40, 8, seed=0)
    assert supports.sum(1).tolist() == [8] * 20
    assert len(np.unique(supports, axis=0)) == 20
    assert (supports == draw_supports(40, 8, seed=0)).all()
    assert (supports != draw_supports(40, 8, seed=1)).any()


def test_aggregates_only_the_episodes_outside():
    scores = np.array([[1.0, 9], [2, 4], [3, 6], [99, 8]])
    supports = np.array([[False, True], [False, False], [False, False], [True, False]])
    found = aggregate(scores, supports)
    assert found["mean"] == pytest.approx([2, 6])
    assert found["lower quartile"] == pytest.approx([1.5, 5])
    assert found["spread"] == pytest.approx([np.std([1, 2, 3]), np.std([4, 6, 8])])


def test_distance_to_a_support_is_that_to_the_nearest_of_its_images():
    torch.manual_seed(0)
    embeddings = torch.randn(6, 4, 80)
    store = FeatureStore()
    store.add([f"{i}.png" for i in range(6)], embeddings)
    neighbours = NearestImages(store, (2, 2), seed=0, window=0, nearest=6)
    supports = np.array([[True, True, False, False, True, False], [False, False, True, False, False, False]])
    found = support_distances(neighbours, supports)

    sample = embeddings.half().float().flatten(0, 1)
    axes = torch.linalg.eigh(torch.cov(sample.T)).eigenvectors.flip(1)[:, :64]
    projected = (embeddings.half().float() - sample.mean(0)) @ axes
    for episode, support in enumerate(supports):
        for image in np.flatnonzero(~support):
            each = (projected[image] - projected[torch.from_numpy(support)]).norm(dim=-1)  # [support x P]
            assert found[episode, image] == pytest.approx(each.amin(0).max().item(), rel=2e-3)
