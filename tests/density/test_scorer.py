import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anomalib_metarefine.density.flow import PatchFlow, position_code
from anomalib_metarefine.density.gaussian import PositionalGaussian
from anomalib_metarefine.density.patch_density import PatchDensity, trainable
from anomalib_metarefine.density.patch_memory import PatchMemory
from anomalib_metarefine.density.scorer import PatchScorer
from anomalib_metarefine.features.embedding import Whitening

GRID = (3, 4)


def fitted(dimensions: int, channels: int, seed: int = 0):
    """A density far from the identity, in double precision, and embeddings to score."""
    torch.manual_seed(seed)
    embeddings = torch.randn(20, 12, channels).double() @ torch.randn(channels, channels).double() + 3
    whitening = Whitening.fit(embeddings.flatten(0, 1), dimensions)
    gaussian = PositionalGaussian.fit([whitening(embeddings)], shrinkage=0.3)
    flow = PatchFlow(dimensions, blocks=3, hidden=5).double()
    for value in flow.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.5)
    return whitening, gaussian, flow, embeddings


def density_of(whitening, gaussians, flow, memory=None):
    return PatchDensity(whitening, tuple(gaussians), flow, trainable(flow), tail=0.2, memory=memory)


@given(st.integers(2, 11), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_whitening_and_flow(dimensions, seed):
    whitening, gaussian, flow, embeddings = fitted(dimensions, dimensions + 2, seed)
    positions = position_code(*GRID).double()
    scorer = PatchScorer().double()
    scorer.load(density_of(whitening, [gaussian], flow), flow, positions)
    z = gaussian(whitening(embeddings))
    output, log_det = flow(z.flatten(0, 1), positions.repeat(20, 1))
    nats = -torch.distributions.Normal(0, 1).log_prob(output).sum(1) - log_det
    expected = (nats.view(20, 12) - gaussian.log_det) / (dimensions * torch.tensor(2.0).double().log())
    torch.testing.assert_close(scorer(embeddings), expected, rtol=1e-9, atol=1e-9)


def test_survives_a_checkpoint():
    whitening, gaussian, flow, embeddings = fitted(8, 9)
    scorer, restored = PatchScorer().double(), PatchScorer().double()
    assert restored.patches == 0
    scorer.load(density_of(whitening, [gaussian], flow), flow, position_code(*GRID).double())
    restored.load_state_dict(scorer.state_dict())
    assert restored.patches == 12
    torch.testing.assert_close(restored(embeddings), scorer(embeddings))


def test_matrices_leave_the_zeros_out():
    scorer = PatchScorer().double()
    whitening, gaussian, flow, _ = fitted(16, 16)
    scorer.load(density_of(whitening, [gaussian], flow), flow, position_code(*GRID).double())
    stored = sum(value.numel() for name, value in scorer.named_buffers() if name.startswith("root"))
    assert stored == pytest.approx(5 / 8 * 12 * 16 * 16)


@given(st.integers(2, 11), st.integers(2, 4), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_of_several_variants_an_image_is_scored_by_the_one_it_fits_best(dimensions, count, seed):
    whitening, _, flow, embeddings = fitted(dimensions, dimensions + 2, seed)
    patches = whitening(embeddings)
    variants = torch.arange(20) % count
    patches += 4 * torch.randn(count, 1, dimensions).double()[variants]
    gaussians = [PositionalGaussian.fit([patches[variants == variant]], shrinkage=0.5) for variant in range(count)]
    density = density_of(whitening, gaussians, flow)
    positions = position_code(*GRID).double()
    scorer = PatchScorer(tail=0.2).double()
    scorer.load(density, flow, positions)
    assert (scorer.patches, scorer.variants) == (12, count)
    shifted = embeddings + (patches - whitening(embeddings)) @ torch.linalg.pinv(whitening.projection)
    torch.testing.assert_close(whitening(shifted), patches)
    torch.testing.assert_close(scorer(shifted), density.score(patches, positions), rtol=1e-9, atol=1e-9)
    restored = PatchScorer(tail=0.2).double()
    restored.load_state_dict(scorer.state_dict())
    torch.testing.assert_close(restored(shifted), scorer(shifted))


def test_the_variant_is_the_true_one_where_variants_lie_apart():
    whitening, gaussian, flow, embeddings = fitted(8, 9)
    patches = whitening(embeddings)
    other = gaussian._replace(mean=gaussian.mean + 5)
    density = PatchDensity(whitening, (gaussian, other), flow, trainable(flow), tail=0.2)
    both = torch.cat([patches, patches + 5])
    unseen = torch.full(both.shape[:2], -1)
    assert density.variants_of(both, unseen).tolist() == [0] * 20 + [1] * 20
    bits = density.score(both, position_code(*GRID).double())
    torch.testing.assert_close(bits[:20], bits[20:])


def test_patches_are_scored_by_a_memory():
    whitening, _, flow, embeddings = fitted(6, 8)
    patches = whitening(embeddings[:10])
    memory = PatchMemory(patches.flatten(0, 1)[::3], torch.arange(120)[::3] // 12)
    density = density_of(whitening, (), flow, memory)
    scorer, restored = PatchScorer().double(), PatchScorer().double()
    scorer.load(density, flow, position_code(*GRID).double())
    assert (scorer.patches, scorer.variants) == (12, 1)
    expected = torch.cdist(whitening(embeddings).flatten(0, 1), memory.patches).amin(1).view(20, 12) / 6**0.5
    torch.testing.assert_close(scorer(embeddings), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(density.score(whitening(embeddings), position_code(*GRID)), scorer(embeddings))
    restored.load_state_dict(scorer.state_dict())
    torch.testing.assert_close(restored(embeddings), scorer(embeddings))
