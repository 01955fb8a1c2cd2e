"""The loss around some parameters: along random directions, on a plane, and its curvature.

The loss of a network with rectifiers hardly changes when one layer is scaled up and the next one down, so a step of a
given length means much around small weights and little around large ones. Directions are therefore *filter-normalised*:
every row of a random direction is as long as the same row of the weights.

To compare two points, the directions around both must be the same, normalised once by the same reference. Around
parameters that start at zero (the last layers of a flow that starts as the identity) there is no choice: normalised by
their own length, they would not be moved at all, and the loss would look flat because nothing was tried.

References:
    - Li et al., "Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913.
    - Aqeel et al., "Meta Learning-Driven Iterative Refinement for Robust Anomaly Detection in Industrial Inspection",
      arXiv 2503.01569 (figure 3: the loss before and after meta-training).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.functional import normalize
from torch.nn.utils import parameters_to_vector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.meta.maml import Loss, Parameters

_TOLERANCE = 1e-3  # of an eigenvalue, relative


def random_direction(reference: Parameters, generator: torch.Generator) -> Parameters:
    """A random direction, filter-normalised.

    Args:
        reference (Parameters): The parameters to move, of any shapes but scalars; others stay where they are. Li et
            al. move weights only: biases and scales have no filters.
        generator (torch.Generator): Source of randomness.

    Returns:
        Parameters: Every row (along the first axis) points anywhere, and is as long as the same row of the reference;
        a row of zeros gives a row of zeros.

    Example:
        >>> weights = {"w": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}
        >>> random_direction(weights, torch.Generator().manual_seed(0))["w"].norm(dim=1).round(decimals=3)
        tensor([5., 2.])
    """
    direction = {}
    for name, value in reference.items():
        rows = value.detach().reshape(len(value), -1)
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        direction[name] = (normalize(noise, dim=1) * rows.norm(dim=1, keepdim=True)).reshape(value.shape)
    return direction


@torch.no_grad()
def rises(
    loss: Loss, centre: Parameters, batch: object, directions: Sequence[Parameters], radius: float
) -> torch.Tensor:
    """How much the loss rises on a sphere around some parameters: sharpness at a finite distance.

    Each direction is gone both ways, and the mean taken: a slope is no sharpness, and cancels.

    Args:
        loss (Loss): Scalar loss of (parameters, batch).
        centre (Parameters): Centre of the sphere.
        batch (object): What the loss is of.
        directions (Sequence[Parameters]): ``K`` of them, from `random_direction`.
        radius (float): In lengths of the directions.

    Returns:
        torch.Tensor: ``[K]``, in the unit of the loss; negative where the loss falls to both sides.
    """
    middle = loss(centre, batch)
    ends = [[loss(_moved(centre, direction, step), batch) for step in (radius, -radius)] for direction in directions]
    return torch.tensor(ends, dtype=middle.dtype).mean(1) - middle


@torch.no_grad()
def surface(
    loss: Loss, centre: Parameters, batch: object, axes: tuple[Parameters, Parameters], steps: Sequence[float]
) -> torch.Tensor:
    """The loss on a plane through some parameters, over its value there.

    Args:
        loss (Loss): Scalar loss of (parameters, batch).
        centre (Parameters): Where the plane is laid through.
        batch (object): What the loss is of.
        axes (tuple[Parameters, Parameters]): The directions that span it.
        steps (Sequence[float]): ``K`` places along each of them, in their lengths.

    Returns:
        torch.Tensor: ``[K x K]``, in the unit of the loss; rows go along the first axis.
    """
    first, second = axes
    middle = loss(centre, batch)
    rows = [
        [loss(_moved(row, second, step), batch) for step in steps]
        for row in (_moved(centre, first, step) for step in steps)
    ]
    return torch.tensor(rows, dtype=middle.dtype) - middle


def largest_eigenvalue(loss: Loss, parameters: Parameters, batch: object, generator: torch.Generator) -> float:
    """The largest eigenvalue of the loss's Hessian: how sharp its sharpest direction is.

    Gradient descent on the batch is stable along that direction up to a step size of 2 over this eigenvalue.

    Only products of the Hessian with vectors are needed. Power iteration takes hundreds of them where eigenvalues lie
    close together, and finds the largest by magnitude, which may be negative; Lanczos' method makes more of the same
    products.

    Args:
        loss (Loss): Scalar loss of (parameters, batch).
        parameters (Parameters): Where; all of them are varied. Double precision serves best.
        batch (object): What the loss is of.
        generator (torch.Generator): Draws the vector to start from.

    Returns:
        float: To a thousandth of it; in the unit of the loss per squared unit of the parameters.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: If it can't be found as exactly; only for a loss that is not smooth.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    slopes = torch.autograd.grad(loss(leaves, batch), list(leaves.values()), create_graph=True)
    slope = parameters_to_vector(slopes)

    def times_hessian(vector: np.ndarray) -> np.ndarray:
        direction = torch.from_numpy(vector).to(slope).flatten()
        # A parameter that the gradient does not depend on has second derivatives of zero.
        columns = torch.autograd.grad(
            slope, list(leaves.values()), direction, retain_graph=True, materialize_grads=True
        )
        return parameters_to_vector([column.contiguous() for column in columns]).double().numpy()

    hessian = LinearOperator((len(slope), len(slope)), matvec=times_hessian, dtype=np.float64)
    start = torch.randn(len(slope), generator=generator, dtype=torch.float64).numpy()
    return eigsh(hessian, k=1, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False).item()


def _moved(centre: Parameters, direction: Parameters, step: float) -> Parameters:
    return {name: value + step * direction[name] if name in direction else value for name, value in centre.items()}
