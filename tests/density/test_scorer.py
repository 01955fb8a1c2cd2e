import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anomalib_metarefine.density.flow import PatchFlow, position_code
from anomalib_metarefine.density.gaussian import PositionalGaussian
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


@given(st.integers(2, 11), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_scores_are_those_of_whitening_and_flow(dimensions, seed):
    whitening, gaussian, flow, embeddings = fitted(dimensions, dimensions + 2, seed)
    positions = position_code(*GRID).double()
    scorer = PatchScorer().double()
    scorer.load(whitening, gaussian, flow, positions)
    z = gaussian(whitening(embeddings))
    output, log_det = flow(z.flatten(0, 1), positions.repeat(20, 1))
    nats = -torch.distributions.Normal(0, 1).log_prob(output).sum(1) - log_det
    expected = (nats.view(20, 12) - gaussian.log_det) / (dimensions * torch.tensor(2.0).double().log())
    torch.testing.assert_close(scorer(embeddings), expected, rtol=1e-9, atol=1e-9)


def test_survives_a_checkpoint():
    whitening, gaussian, flow, embeddings = fitted(8, 9)
    scorer, restored = PatchScorer().double(), PatchScorer().double()
    assert restored.patches == 0
    scorer.load(whitening, gaussian, flow, position_code(*GRID).double())
    restored.load_state_dict(scorer.state_dict())
    assert restored.patches == 12
    torch.testing.assert_close(restored(embeddings), scorer(embeddings))


def test_matrices_leave_the_zeros_out():
    scorer = PatchScorer().double()
    scorer.load(*fitted(16, 16)[:3], position_code(*GRID).double())
    stored = sum(value.numel() for name, value in scorer.named_buffers() if name.startswith("root"))
    assert stored == pytest.approx(5 / 8 * 12 * 16 * 16)
