"""A fitted density of patches: Gaussians of the places, one set a variant, then the flow; or a memory of patches.

An image is as unusual as the variant that it fits best says. Which one that is, the tail of the bits of the leading
channels tells: a sixteenth of the cost of all channels, and the map of the places needs no others for it.

Where parts lie anywhere, or images share too little, places say nothing. There the score of a patch is its distance to
the nearest one of a memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.func import functional_call

from anomalib_metarefine.density.flow import PatchFlow, bits_per_dimension
from anomalib_metarefine.features.embedding import image_score

if TYPE_CHECKING:
    from collections.abc import Callable

    from anomalib_metarefine.density.gaussian import PositionalGaussian
    from anomalib_metarefine.density.patch_memory import PatchMemory
    from anomalib_metarefine.features.embedding import Whitening

Parameters = dict[str, torch.Tensor]


class PatchDensity(NamedTuple):
    """Global whitening, positional whitening, flow with its parameters; scores are in bits per dimension.

    With a memory there is no positional whitening, the flow is not asked, and scores are distances.
    """

    whitening: Whitening  # C to D channels
    gaussians: tuple[PositionalGaussian, ...]  # of the P places, one for each variant
    flow: PatchFlow  # the architecture, shared by the variants
    parameters: Parameters  # of the flow
    tail: float  # share of the patches that say how well an image fits a variant
    memory: PatchMemory | None = None

    @property
    def variants(self) -> int:
        """How many are told apart."""
        return max(1, len(self.gaussians))

    def score(
        self, whitened: torch.Tensor, positions: torch.Tensor, fitted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores of patches, those it was fitted on as if each had been left out.

        Args:
            whitened (torch.Tensor): ``[n x P x D]``, globally whitened.
            positions (torch.Tensor): ``[P x 16]``.
            fitted (torch.Tensor | None): ``[n x P]`` number of the Gaussian that each patch was fitted on, with a
                memory of the image; -1 for none. ``None`` if the images are new.

        Returns:
            torch.Tensor: ``[n x P]``.
        """
        fitted = torch.full(whitened.shape[:2], -1) if fitted is None else fitted
        if self.memory is not None:
            return self.memory.distances(whitened, fitted.amax(1))
        variants = self.variants_of(whitened, fitted)
        z, log_det = torch.empty_like(whitened), whitened.new_empty(whitened.shape[:2])
        for number in variants.unique().tolist():
            own = variants == number
            z[own], log_det[own] = held_out(whitened[own], self.gaussians[number], fitted[own] == number)
        output, flow_log_det = functional_call(
            self.flow, self.parameters, (z.flatten(0, 1), positions.repeat(len(whitened), 1))
        )
        return bits_per_dimension(output, flow_log_det + log_det.flatten()).view(len(whitened), -1)

    def variants_of(self, whitened: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
        """Number ``[n]`` of the Gaussian that each image fits best; ``fitted`` as in `score`."""
        if len(self.gaussians) == 1:
            return torch.zeros(len(whitened), dtype=torch.long)
        channels = routing_channels(whitened.shape[-1])
        leading = whitened[..., :channels]
        scores = [
            image_score(bits_per_dimension(*held_out(leading, gaussian.leading(channels), fitted == number)), self.tail)
            for number, gaussian in enumerate(self.gaussians)
        ]
        return torch.stack(scores).argmin(0)


def routing_channels(dimensions: int) -> int:
    """How many of the channels say which variant an image belongs to."""
    return max(1, round(dimensions / 4))


def held_out(
    whitened: torch.Tensor, gaussian: PositionalGaussian, fitted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positional whitening, with the leave-one-out correction for the patches ``[n x P]`` that were fitted on."""
    z = gaussian(whitened)
    left_out, log_det = gaussian.leave_one_out(z)
    return torch.where(fitted.unsqueeze(-1), left_out, z), torch.where(fitted, log_det, gaussian.log_det)


def new_flow(channels: int, dimensions: int, blocks: int, hidden: int, seed: int) -> PatchFlow:
    """An untrained flow for embeddings of so many channels; the same seed gives the same flow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchFlow(min(dimensions, channels), blocks, hidden)


def trainable(flow: PatchFlow) -> Parameters:
    """Detached copies of the parameters that learn; the frozen permutations of the couplings stay out."""
    return {
        name: value.detach().clone().requires_grad_() for name, value in flow.named_parameters() if value.requires_grad
    }


def flow_loss(flow: PatchFlow, trim: float) -> Callable[[Parameters, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Loss of the flow's parameters on patches and their positions: trimmed mean of the patch scores.

    The least likely patches of a dirty set must not be learned.

    Args:
        flow (PatchFlow): The architecture.
        trim (float): Share of the least likely patches that are not learned from.

    Returns:
        Callable: A scalar function, in bits per dimension, of parameters and (patches ``[M x D]``, positions
            ``[M x 16]``).
    """

    def loss(parameters: Parameters, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        z, log_det = functional_call(flow, parameters, (batch[0], batch[1]))
        bits = bits_per_dimension(z, log_det)
        trusted = max(1, round((1 - trim) * len(bits)))
        return bits.topk(trusted, largest=False, sorted=False).values.mean()

    return loss
