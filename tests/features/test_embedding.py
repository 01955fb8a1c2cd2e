import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anomalib_metarefine.features.embedding import Whitening, image_score, patch_embeddings


def test_global_whitening_gives_unit_covariance():
    x = torch.randn(2000, 6, 5) @ torch.randn(5, 5) + torch.randn(5)
    x = x.reshape(-1, 5)
    z = Whitening.fit(x, 5)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(5), atol=0.05, rtol=0)


@pytest.mark.parametrize("shapes", [[(8, 20), (4, 10)], [(9, 21), (4, 10)], [(4, 10), (8, 20)], [(4, 10)]])
def test_maps_of_any_shape_meet_on_one_grid(shapes):
    maps = [torch.ones(2, 3, *shape) for shape in shapes]
    rows, columns = shapes[-1]
    embeddings = patch_embeddings(maps)
    assert embeddings.shape == (2, rows * columns, 3 * len(shapes))
    torch.testing.assert_close(embeddings, torch.ones_like(embeddings))


@given(st.floats(0.01, 1), st.integers(1, 50))
def test_image_score_lies_between_mean_and_maximum(tail, patches):
    scores = torch.randn(3, patches)
    score = image_score(scores, tail)
    assert (score <= scores.amax(1) + 1e-5).all()
    assert (score >= scores.mean(1) - 1e-5).all()
