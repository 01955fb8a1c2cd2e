"""A normalizing flow over whitened patch embeddings, conditioned on the position of the patch.

References:
    - Dinh et al., "Density estimation using Real NVP", arXiv 1605.08803 (affine couplings).
    - Gudovskiy et al., "CFLOW-AD", arXiv 2107.12571 (flow on patches, conditioned on a sine position code).
    - Ardizzone et al., FrEIA, the framework the couplings come from.
"""

from __future__ import annotations

import math

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from torch import nn
from torch.nn import functional

POSITION_CHANNELS = 16
AFFINE_CLAMPING = 2.0  # logarithms of the scales stay within this


class PatchFlow(nn.Module):
    """Affine couplings on single patches; starts as the identity.

    An untrained flow is the identity up to a permutation, so its density is the Gaussian of the whitening before it:
    learning starts from a good model, and a small step stays near it.

    Args:
        dimensions (int): Channels ``D`` of a whitened patch, at least 2.
        blocks (int): Coupling blocks.
        hidden (int): Width of the one hidden layer of each coupling network.

    Example:
        >>> flow = PatchFlow(dimensions=8, blocks=2, hidden=16)
        >>> z, log_det = flow(torch.randn(5, 8), position_code(1, 5))
        >>> tuple(z.shape), tuple(log_det.shape)
        ((5, 8), (5,))
    """

    def __init__(self, dimensions: int, blocks: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.dimensions = dimensions

        def subnet(inputs: int, outputs: int) -> nn.Module:
            last = nn.Linear(hidden, outputs)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), last)

        self.couplings = SequenceINN(dimensions)
        for _ in range(blocks):
            self.couplings.append(
                AllInOneBlock,
                cond=0,
                cond_shape=(POSITION_CHANNELS,),
                subnet_constructor=subnet,
                affine_clamping=AFFINE_CLAMPING,
            )
            block = self.couplings.module_list[-1]
            # FrEIA draws its permutation from NumPy's global state; this one follows torch's seed, as weights do.
            block.w_perm.data = torch.eye(dimensions)[torch.randperm(dimensions)]
            block.w_perm_inv.data = block.w_perm.data.T.contiguous()
            block.global_scale_activation = _global_scale  # FrEIA's is a lambda, which anomalib's export can't pickle
            block.permute_function = _permute  # FrEIA's multiplies by the matrix, a fifth of its time

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map patches to the base distribution.

        Args:
            patches (torch.Tensor): ``[M x D]``.
            positions (torch.Tensor): ``[M x 16]``, rows of `position_code`.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: ``[M x D]`` and the log-determinant of the Jacobian, ``[M]``.
        """
        return self.couplings(patches, c=[positions])

    def inverse(self, z: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The patches ``[M x D]`` that `forward` maps to ``z``."""
        return self.couplings(z, c=[positions], rev=True)[0]

    def bits(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood in bits per dimension, ``[M]``: the patch score."""
        z, log_det = self(patches, positions)
        return bits_per_dimension(z, log_det)


def _permute(values: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """Channels of ``[M x D]`` in the order that a permutation matrix ``[D x D]`` gives them."""
    return values.index_select(1, permutation.argmax(1))


def _global_scale(values: torch.Tensor) -> torch.Tensor:
    """The scale that FrEIA's block makes of its parameter."""
    return 0.1 * functional.softplus(values, beta=0.5)


def bits_per_dimension(z: torch.Tensor, log_det: torch.Tensor) -> torch.Tensor:
    """``-log2 p(x) / D`` under a standard normal base: ``z`` ``[... x D]``, ``log_det`` ``[...]``."""
    dimensions = z.shape[-1]
    nats = 0.5 * z.square().sum(-1) + 0.5 * dimensions * math.log(2 * math.pi) - log_det
    return nats / (dimensions * math.log(2))


def position_code(height: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column at four octaves, ``[height * width x 16]`` in row-major order.

    Relative to the image, so that one code means one place at any resolution.
    """
    row = (torch.arange(height) + 0.5) / height
    column = (torch.arange(width) + 0.5) / width
    rows, columns = (axis.reshape(-1, 1) for axis in torch.meshgrid(row, column, indexing="ij"))
    octaves = math.pi * 2 ** torch.arange(POSITION_CHANNELS // 4)
    return torch.cat(
        [wave(octaves * axis) for axis in (rows, columns) for wave in (torch.sin, torch.cos)],
        dim=1,
    )
