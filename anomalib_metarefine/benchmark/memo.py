"""Read, resize and embed every image once, however many models are trained on it.

A benchmark of anomalib's feature-based models sends the same images through the same frozen backbone hundreds of
times. Both steps are deterministic, so their results are kept: resized images by path and size, feature maps by the
content of the image that the backbone sees. The models do not notice; their scores stay what they were.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from anomalib.data.dataclasses.torch import ImageBatch, ImageItem
from anomalib.data.utils import read_image
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import Resize

if TYPE_CHECKING:
    from collections.abc import Hashable

    import pandas as pd
    from anomalib.models.components import TimmFeatureExtractor


class Memo:
    """Tensors by key, up to a memory limit.

    Past the limit nothing more is kept, and what is asked for is computed again: slower, never wrong.

    Args:
        limit_mb (float): Megabytes of tensors to keep at most.

    Example:
        >>> memo = Memo(limit_mb=1)
        >>> memo.put("a", torch.ones(4))
        >>> memo.get("a"), memo.get("b")
        (tensor([1., 1., 1., 1.]), None)
    """

    def __init__(self, limit_mb: float = 2560) -> None:
        self._limit = limit_mb * 2**20
        self._tensors: dict[Hashable, torch.Tensor] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The tensor of a key, ``None`` if it is not kept. It is shared: do not write into it."""
        return self._tensors.get(key)

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep a tensor if there is room for it."""
        if key in self._tensors or self._bytes + tensor.nbytes > self._limit:
            return
        # A copy, because a slice would keep the memory of its whole batch.
        self._tensors[key] = tensor.detach().cpu().clone()
        self._bytes += tensor.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._tensors.clear()
        self._bytes = 0


class MemoisedImages(Dataset):
    """Images and labels as an anomalib dataset gives them, decoded and resized once.

    Args:
        samples (pd.DataFrame): Rows with ``image_path`` and ``label_index``. The label is never kept: an image may be
            normal in one training set, where it is an unlabelled defect, and abnormal in another's test set.
        image_size (tuple[int, int]): Height and width, resized to as anomalib's datamodules do.
        memo (Memo): Where resized images are kept.
    """

    def __init__(self, samples: pd.DataFrame, image_size: tuple[int, int], memo: Memo) -> None:
        self.paths = samples.image_path.astype(str).tolist()
        self.labels = samples.label_index.astype(int).tolist()
        self.resize = Resize(image_size, antialias=True)
        self.memo = memo

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageItem:
        """One image ``[3 x H x W]`` in [0, 1], its label and path."""
        path = self.paths[index]
        key = (path, tuple(self.resize.size))
        image = self.memo.get(key)
        if image is None:
            image = self.resize(read_image(path, as_tensor=True))
            self.memo.put(key, image)
        return ImageItem(image=image, gt_label=torch.tensor(self.labels[index]), image_path=path)

    collate_fn = staticmethod(ImageBatch.collate)


class MemoisedExtractor(nn.Module):
    """A frozen feature extractor that embeds every image once.

    Images are known by a hash of their pixels, all of them, so that no other image is ever taken for one.

    Args:
        extractor (TimmFeatureExtractor): anomalib's extractor, in evaluation mode.
        memo (Memo): Where feature maps are kept. Extractors of one backbone share what they have in common.
    """

    def __init__(self, extractor: TimmFeatureExtractor, memo: Memo) -> None:
        super().__init__()
        self.extractor = extractor
        self.memo = memo

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps of ``[B x 3 x H x W]`` images: for every layer ``[B x C_l x H_l x W_l]``, a fresh copy."""
        layers = self.extractor.layers
        keys = [self._key(image) for image in images]
        known = {(key, layer): self.memo.get((key, layer)) for key in keys for layer in layers}
        missing = [i for i, key in enumerate(keys) if any(known[key, layer] is None for layer in layers)]
        if missing:
            for layer, maps in self.extractor(images[missing]).items():
                for i, features in zip(missing, maps, strict=True):
                    known[keys[i], layer] = features
                    self.memo.put((keys[i], layer), features)
        return {layer: torch.stack([known[key, layer].to(images.device) for key in keys]) for layer in layers}

    def _key(self, image: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
        pixels = image.cpu().contiguous().numpy()
        return str(self.extractor.backbone), pixels.shape, hashlib.sha1(pixels, usedforsecurity=False).digest()
