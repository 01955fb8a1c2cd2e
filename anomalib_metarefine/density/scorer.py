"""A fitted density rearranged for inference: the same patch scores from fewer and smaller operations.

Nothing is approximated. Against applying whitening and flow as they were fitted:

- the triangular matrices of the positional whitening are cut into blocks that leave most zeros out (10 MB instead of
  17 at the default size; reading them is what they cost);
- the permutations between the couplings are folded into the couplings' weights, which then act on the channels in
  their first order;
- what a coupling makes of the position of a patch is constant, and becomes a bias;
- the scales and offsets that follow each coupling are folded into the outputs of its network;
- of several variants only the leading channels are whitened, and all channels for the one that the image fits best.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from anomalib_metarefine.density.flow import AFFINE_CLAMPING, bits_per_dimension
from anomalib_metarefine.density.patch_density import routing_channels
from anomalib_metarefine.density.patch_memory import nearest
from anomalib_metarefine.features.embedding import image_score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.density.gaussian import PositionalGaussian
    from anomalib_metarefine.density.patch_density import PatchDensity
    from anomalib_metarefine.features.embedding import Whitening

_ROOT_BLOCKS = 4  # of a triangular matrix: 5/8 of its entries are left
_NETWORK_SCALE = 0.1  # by which an `AllInOneBlock` multiplies what its network gives
_COUPLING = ("weight_in", "bias_in", "weight_out", "bias_out", "log_gain")


class PatchScorer(nn.Module):
    """Scores of the patches of images, on the grid that a density was fitted on; empty before `load`.

    ``K`` couplings with ``H`` hidden channels act on ``P`` patches of ``D`` whitened channels. Of ``V`` variants, an
    image is scored under the one that it fits best; with one variant there is nothing to choose, and no axis for it.

    Args:
        tail (float): Share of the patches that say how well an image fits a variant.
    """

    projection: torch.Tensor  # [C x D]
    shift: torch.Tensor  # [(V x) P x D]
    weight_in: torch.Tensor  # [K x D x H]
    bias_in: torch.Tensor  # [K x P x H]
    weight_out: torch.Tensor  # [K x H x 2D]: logarithms of scales, then translations
    bias_out: torch.Tensor  # [K x 2D]
    log_gain: torch.Tensor  # [K x D]: near 0, where FP16 is finer than near 1
    log_det: torch.Tensor  # [(V x) P]: of all that does not depend on the patch
    leading_log_det: torch.Tensor  # [V x P]: of the leading channels; empty with one variant
    memory: torch.Tensor  # [M x D], see `PatchMemory`; empty without one, and with one all but the first two are

    def __init__(self, tail: float = 0.03) -> None:
        super().__init__()
        self.tail = tail
        roots = [f"root_{i}" for i in range(_ROOT_BLOCKS)]  # [(V x) P x columns to block's end x its rows]
        for name in ("projection", "shift", *roots, *_COUPLING, "log_det", "leading_log_det", "memory"):
            self.register_buffer(name, torch.empty(0))

    @torch.no_grad()
    def load(self, density: PatchDensity, flow: PatchFlow, positions: torch.Tensor) -> None:
        """Take over a fitted density, all of it on one device.

        Args:
            density (PatchDensity): Of ``P`` patches.
            flow (PatchFlow): With its fitted parameters.
            positions (torch.Tensor): Position codes ``[P x 16]``.
        """
        folded = dict.fromkeys(dict(self.named_buffers()), torch.empty(0))
        if density.memory is None:
            folded |= _folded(density.whitening, density.gaussians, flow, positions)
        else:
            whitening = density.whitening
            folded["projection"], folded["memory"] = whitening.projection, density.memory.patches
            folded["shift"] = (whitening.mean @ whitening.projection).repeat(len(positions), 1)
        for name, value in folded.items():
            setattr(self, name, value.to(self.projection.device))

    @property
    def patches(self) -> int:
        """Patches ``P`` of an image; 0 before `load`."""
        return self.shift.shape[-2] if self.variants else 0

    @property
    def variants(self) -> int:
        """Variants ``V`` that are told apart; 0 before `load`."""
        return {1: 0, 2: 1}.get(self.shift.dim()) or len(self.shift)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"patches={self.patches}, variants={self.variants}"

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Patch scores.

        Args:
            embeddings (torch.Tensor): ``[B x P x C]``, from the backbone.

        Returns:
            torch.Tensor: ``[B x P]``, bits per dimension; of a memory, distances.
        """
        if self.memory.numel():
            return nearest(embeddings @ self.projection - self.shift, self.memory)
        z, log_det = self._whiten(embeddings @ self.projection)
        # A share in every channel: to sums [B x P] of several images, OpenVINO 2026.4 adds a constant [P] wrongly.
        log_det = log_det.unsqueeze(-1) / z.shape[-1]
        for k in range(self.log_gain.shape[0]):
            hidden = (z @ self.weight_in[k] + self.bias_in[k]).relu()
            log_scale, translation = (hidden @ self.weight_out[k] + self.bias_out[k]).chunk(2, dim=-1)
            log_scale = AFFINE_CLAMPING * log_scale.tanh()
            z = z * (log_scale + self.log_gain[k]).exp() + translation
            log_det = log_det + log_scale
        return bits_per_dimension(z, log_det.sum(-1))

    def _whiten(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positional whitening of ``[B x P x D]``, and what it adds to the log-likelihood, ``[(B x) P]``."""
        roots = [getattr(self, f"root_{i}") for i in range(_ROOT_BLOCKS)]
        ends = [end for _, end in _blocks(projected.shape[-1])]
        if self.variants == 1:
            centred = (projected - self.shift).transpose(0, 1)
            products = [centred[..., :end] @ root for root, end in zip(roots, ends, strict=True)]
            return torch.cat(products, dim=-1).transpose(0, 1), self.log_det
        chosen = self._fits_best(projected)
        centred = (projected - self.shift[chosen]).unsqueeze(2)
        products = [centred[..., :end] @ root[chosen] for root, end in zip(roots, ends, strict=True)]
        return torch.cat(products, dim=-1).squeeze(2), self.log_det[chosen]

    def _fits_best(self, projected: torch.Tensor) -> torch.Tensor:
        """Number ``[B]`` of the variant whose leading channels say that an image is the most usual."""
        channels = self.root_0.shape[-1]
        centred = (projected[..., :channels] - self.shift[:, None, :, :channels]).transpose(1, 2)
        z = centred @ self.root_0  # [V x P x B x channels]
        nats = (0.5 * z.square() - self.leading_log_det[..., None, None] / channels).sum(-1)
        return image_score(nats.transpose(1, 2), self.tail).argmin(0)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        """Take the sizes from the checkpoint: before `load` the buffers are empty."""
        for name, buffer in self.named_buffers():
            if prefix + name in state_dict:
                buffer.resize_(state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _blocks(dimensions: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of each block of a triangular matrix; blocks may be empty, but for the first."""
    edges = [round(i * dimensions / _ROOT_BLOCKS) for i in range(_ROOT_BLOCKS + 1)]
    edges[1] = routing_channels(dimensions)
    return list(itertools.pairwise(edges))


def _folded(
    whitening: Whitening, gaussians: Sequence[PositionalGaussian], flow: PatchFlow, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Buffers of a density with Gaussians."""
    couplings = _fold(flow, positions)
    folded = {name: torch.stack([coupling[name] for coupling in couplings]) for name in _COUPLING}
    for i, (start, end) in enumerate(_blocks(flow.dimensions)):
        folded[f"root_{i}"] = _stack([one.precision_root[:, start:end, :end].mT for one in gaussians])
    folded["projection"] = whitening.projection
    folded["shift"] = whitening.mean @ whitening.projection + _stack([one.mean for one in gaussians])
    folded["log_det"] = _stack([one.log_det for one in gaussians]) + folded["log_gain"].sum()
    if len(gaussians) > 1:
        channels = routing_channels(flow.dimensions)
        folded["leading_log_det"] = torch.stack([one.leading(channels).log_det for one in gaussians])
    return folded


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    """A first axis for the variants, where there are several."""
    return torch.stack(values) if len(values) > 1 else values[0].contiguous()


def _fold(flow: PatchFlow, positions: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The couplings of a flow as they act on the channels in their first order.

    A channel that a coupling leaves as it is gets zero weights: the logarithm of its scale, and its translation, are 0.
    """
    dimensions = flow.dimensions
    channel = torch.arange(dimensions)  # in the first order, of each input of the coupling at hand
    couplings = []
    for block in flow.couplings.module_list:
        first, _, last = block.subnet
        passive = block.splits[0]
        gain, offset = (values.new_empty(dimensions) for values in (block.global_scale, block.global_offset))
        gain[channel] = block.global_scale_activation(block.global_scale).flatten()
        offset[channel] = block.global_offset.flatten()
        weight_in = first.weight.new_zeros(dimensions, first.out_features)
        weight_in[channel[:passive]] = first.weight[:, :passive].T
        weight_out = last.weight.new_zeros(2, dimensions, last.in_features)
        bias_out = last.bias.new_zeros(2, dimensions)
        moved = channel[passive:]
        weight_out[:, moved] = _NETWORK_SCALE * last.weight.unflatten(0, (2, -1))
        bias_out[:, moved] = _NETWORK_SCALE * last.bias.unflatten(0, (2, -1))
        bias_out[1] = bias_out[1] * gain + offset
        weight_out[1] *= gain.unsqueeze(1)
        couplings.append(
            {
                "weight_in": weight_in,
                "bias_in": positions @ first.weight[:, passive:].T + first.bias,
                "weight_out": weight_out.flatten(0, 1).T.contiguous(),
                "bias_out": bias_out.flatten(),
                "log_gain": gain.log(),
            }
        )
        channel = channel[block.w_perm.argmax(1)]
    return couplings
