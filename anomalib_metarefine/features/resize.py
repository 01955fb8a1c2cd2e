"""One resize for training and for the exported graph.

anomalib switches ``antialias`` off when it exports a ``Resize``, so a large image is scored differently by the exported
model than by the trained one (upstream issues 2448, 3548, 3726). Exporting the antialiased operator instead does not
help: OpenVINO's conversion drops the flag. The antialiased bilinear resize is a linear map per axis, though, and two
small matrix products export exactly.
"""

from __future__ import annotations

import torch
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms.v2 import Compose, Resize, Transform


class ExactResize(nn.Module):
    """Antialiased bilinear resize as two matrix products; equals ``torchvision``'s to the rounding error.

    The filter weights are computed with integers: on processors with bfloat16, OpenVINO lowers floating-point
    arithmetic to 8 bits of mantissa by default, and pixel positions above 256 would no longer be whole numbers.

    Args:
        size (tuple[int, int]): Output height and width.

    Example:
        >>> image = torch.rand(1, 3, 300, 200)
        >>> expected = Resize((256, 256), antialias=True)(image)
        >>> bool((ExactResize((256, 256))(image) - expected).abs().max() < 1e-5)
        True
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize ``[... x H x W]`` to ``[... x size]``."""
        height, width = images.shape[-2:]
        if (height, width) == self.size:
            return images
        rows = _filter(height, self.size[0], images)
        columns = _filter(width, self.size[1], images)
        return rows @ images @ columns.T


def _filter(source: int, target: int, like: torch.Tensor) -> torch.Tensor:
    """Triangle filter ``[target x source]``, as wide as the larger of the two pixel pitches; rows sum to one."""
    inputs = 2 * torch.arange(source, device=like.device) + 1
    outputs = 2 * torch.arange(target, device=like.device) + 1
    support = 2 * torch.sym_max(source, target)
    weights = (support - (inputs * target - outputs.unsqueeze(1) * source).abs()).clamp_min(0)
    return weights.to(like.dtype) / weights.sum(1, keepdim=True).to(like.dtype)


def suggested_size(height: float, width: float, area: float = 256 * 256, multiple: int = 32) -> tuple[int, int]:
    """A size of the shape of an image that backbones take.

    Args:
        height (float): Of the image, in any unit.
        width (float): In the same unit.
        area (float): Pixels wanted.
        multiple (int): Of which both sides must be multiples.

    Example:
        >>> suggested_size(800, 320)
        (416, 160)
    """
    scale = (area / (height * width)) ** 0.5
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor with the same resize in training and export.

    ``transform`` stays what anomalib knows (a torchvision ``Resize`` and ``Normalize``), so that datamodules,
    checkpoints and every other part of anomalib treat it as usual; only the exported counterpart differs.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = exact_export_transform(transform)

    def load_checkpoint_config(self, config: dict) -> None:
        """Restore the transform from a checkpoint, and with it the exported counterpart."""
        super().load_checkpoint_config(config)
        self.export_transform = exact_export_transform(self.transform)


def exact_export_transform(transform: Transform | None) -> nn.Module | None:
    """The transform with every antialiased two-sided ``Resize`` replaced by `ExactResize`."""
    if isinstance(transform, Compose):
        return nn.Sequential(*(exact_export_transform(part) for part in transform.transforms))
    if isinstance(transform, Resize) and transform.antialias and len(transform.size or ()) == 2:
        return ExactResize(tuple(transform.size))
    return transform
