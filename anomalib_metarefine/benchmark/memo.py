"""Read, resize and embed every image once, however many models are trained on it.

A benchmark of feature-based models sends the same images through the same frozen backbone hundreds of times. Both
steps are deterministic, so their results are kept: resized images by path and size, feature maps by the weights of the
network and the content of the image that it sees. The models do not notice; their scores stay what they were.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING

import torch
from anomalib.models.components import TimmFeatureExtractor
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import FeatureInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

    from torch import nn

_FEATURES = "features"


class Memo:
    """Tensors by key, up to a memory limit.

    Past the limit nothing more is kept, and what is asked for is computed again: slower, never wrong.

    Args:
        limit_mb (float): Megabytes of tensors to keep at most.
        folder (Path | None): Where tensors that `write` wrote are looked for first.
        writes (bool): Past the limit, write what is kept to the folder. Only one process may.

    Attributes:
        nbytes (int): Bytes of the tensors that are kept, and of those that were read from files.
        seconds (float): Spent so far on computing what was asked for.

    Example:
        >>> memo = Memo(limit_mb=1)
        >>> memo.fetch("a", ["x", "y"], lambda: [torch.ones(2), torch.zeros(1)])
        [tensor([1., 1.]), tensor([0.])]
        >>> memo.fetch("a", ["y"], lambda: 1 / 0)
        [tensor([0.])]
    """

    def __init__(self, limit_mb: float = 2560, folder: Path | None = None, writes: bool = False) -> None:
        self._limit = limit_mb * 2**20
        self._folder, self._writes = folder, writes
        self._written: dict[str, safe_open] = {}
        self._read: set[str] = set()
        self._tensors: dict[str, torch.Tensor] = {}
        self._cost: dict[str, float] = {}
        self._asked: set[Hashable] = set()
        self.nbytes = 0
        self.seconds = 0.0
        for file in sorted(folder.glob("*.safetensors")) if folder else ():
            self._open(file)

    def __len__(self) -> int:
        return len(self._tensors)

    def __deepcopy__(self, _copied: dict[int, object]) -> Memo:
        """Itself: anomalib copies a dataset to take some of its images."""
        return self

    def fetch(
        self, key: Hashable, names: Sequence[str], compute: Callable[[], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Tensors of a key, one for each name, computed if any is not kept. They are shared: do not write into them."""
        self._asked.add(key)
        found = [self._find(_name(key, name)) for name in names]
        if any(tensor is None for tensor in found):
            begin = time.perf_counter()
            found = [tensor.detach() for tensor in compute()]
            seconds = self._cost[repr(key)] = time.perf_counter() - begin
            self.seconds += seconds
            for name, tensor in zip(names, found, strict=True):
                self._keep(_name(key, name), tensor)
        return found

    def restart(self) -> None:
        """Start a new list of what is asked for, see `feature_seconds`."""
        self._asked.clear()

    @property
    def feature_seconds(self) -> float:
        """What the features asked for since `restart` took, or take, to compute once; NaN if there were none.

        The time is that of when they were computed, be it earlier and for another model.
        """
        costs = [self._cost[repr(key)] for key in self._asked if key[0] == _FEATURES]
        return sum(costs) if costs else float("nan")

    def write(self) -> None:
        """Write what is kept to a file in the folder: complete there, or not at all."""
        if not self._tensors:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{len(list(self._folder.glob('*.safetensors'))):06d}.safetensors"
        unfinished = file.with_suffix(".unfinished")
        save_file(self._tensors, unfinished, {"seconds": json.dumps(self._cost)})
        unfinished.replace(file)
        self.nbytes -= sum(tensor.nbytes for tensor in self._tensors.values())
        self._tensors.clear()
        self._open(file)

    def _open(self, file: Path) -> None:
        """Map a file into memory: what is read of it needs no copy, and is shared with other processes."""
        opened = safe_open(file, framework="pt")
        self._written |= dict.fromkeys(opened.keys(), opened)
        self._cost |= json.loads(opened.metadata()["seconds"])

    def _find(self, name: str) -> torch.Tensor | None:
        if name not in self._written:
            return self._tensors.get(name)
        tensor = self._written[name].get_tensor(name)
        if name not in self._read:
            self._read.add(name)
            self._limit += tensor.nbytes  # it takes no room but that of the file
            self.nbytes += tensor.nbytes
        return tensor

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._tensors or name in self._written:
            return
        if self.nbytes + tensor.nbytes > self._limit:
            if not self._writes:
                return
            self.write()
        # A copy, because a slice would keep the memory of its whole batch.
        self._tensors[name] = tensor.as_subclass(torch.Tensor).cpu().clone(memory_format=torch.contiguous_format)
        self.nbytes += tensor.nbytes


def _name(key: Hashable, name: str) -> str:
    return repr((key, name))


class MemoisedFeatures:
    """Stands in for the `forward` of a frozen network that gives feature maps.

    Images are known by a hash of their pixels, all of them, and networks by one of their structure and weights, so that
    none is ever taken for another. Images are embedded one by one: on a processor that is no slower, and the last bits
    of a feature depend on the size of its batch.

    Args:
        network (nn.Module): A timm network of feature maps, in evaluation mode.
        memo (Memo): Where feature maps are kept. Networks with the same weights share what they have in common.
    """

    def __init__(self, network: nn.Module, memo: Memo) -> None:
        self.compute = network.forward
        self.names = list(network.feature_info.module_name())
        self.memo = memo
        self.identity = _digest(repr(network).encode(), *network.state_dict().values())

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of ``[B x 3 x H x W]`` images: for every layer ``[B x C_l x H_l x W_l]``, a fresh copy."""
        parts = []
        for image in images:
            key = (_FEATURES, self.identity, str(image.dtype), tuple(image.shape), _digest(image))
            parts.append(self.memo.fetch(key, self.names, lambda image=image: self._embed(image)))
        return [torch.stack(maps).to(images.device) for maps in zip(*parts, strict=True)]

    def _embed(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [maps[0].cpu() for maps in self.compute(image.unsqueeze(0))]


def frozen_networks(model: nn.Module) -> Iterator[nn.Module]:
    """Networks of feature maps by timm in a model, as far as nothing trains them."""
    untrained = {id(part.feature_extractor) for part in model.modules() if _is_frozen_extractor(part)}
    for module in model.modules():
        if isinstance(getattr(module, "feature_info", None), FeatureInfo) and (
            id(module) in untrained or not any(parameter.requires_grad for parameter in module.parameters())
        ):
            yield module


def _is_frozen_extractor(module: nn.Module) -> bool:
    return isinstance(module, TimmFeatureExtractor) and not module.requires_grad


def _digest(*values: torch.Tensor | bytes) -> bytes:
    found = hashlib.sha1(usedforsecurity=False)
    for value in values:
        if isinstance(value, bytes):
            found.update(value)
        else:
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.digest()
