"""A meta-learned initialisation as a file: learned on several categories, adapted to a new one in a few steps.

A flow knows patches by the global whitening before it, so the two are shared together; mean and covariance of every
place are always the new category's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anomalib_metarefine.density.patch_density import new_flow, trainable
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE, Backbone
from anomalib_metarefine.features.embedding import Whitening
from anomalib_metarefine.features.gather import gather, versions
from anomalib_metarefine.progress import progress_bars
from anomalib_metarefine.refinement.fitting import Images, fit_whitening, learn_initialisation
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.features.store import FeatureStore
    from anomalib_metarefine.meta.maml import Parameters

_FORMAT = 2
_PATCHES = 65_536  # of all categories together, that the whitening is fitted on


@dataclass(frozen=True)
class SharedInitialisation:
    """What `MetaRefine(init_from=...)` starts from.

    Attributes:
        whitening (Whitening): Of the patches of all categories.
        flow (dict[str, torch.Tensor]): State of the `PatchFlow`, its frozen permutations included.
        made_for (dict[str, Any]): ``backbone``, ``layers``, ``dimensions``, ``blocks`` and ``hidden``, which a model
            must have too.
        run (dict[str, Any]): Data, seed, settings and versions.
    """

    whitening: Whitening
    flow: dict[str, torch.Tensor]
    made_for: dict[str, Any]
    run: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a file that loads without running any code in it; its folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"metarefine_initialisation": _FORMAT, **vars(self), "whitening": tuple(self.whitening)}, path)

    @classmethod
    def load(cls, path: str | Path) -> SharedInitialisation:
        """Read what `save` wrote.

        Args:
            path (str | Path): The file.

        Returns:
            SharedInitialisation: Its contents, on the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is something else.
        """
        if not Path(path).is_file():
            msg = f"There is no initialisation {path}. `metarefine meta-train` makes one."
            raise FileNotFoundError(msg)
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            msg = f"{path} is not an initialisation of `metarefine meta-train`: {error}"
            raise ValueError(msg) from error
        parts = {"metarefine_initialisation", *(field.name for field in fields(cls))}
        if not isinstance(data, dict) or data.keys() != parts or data.pop("metarefine_initialisation") != _FORMAT:
            msg = f"{path} is not an initialisation of `metarefine meta-train` (format {_FORMAT})."
            raise ValueError(msg)
        return cls(**{**data, "whitening": Whitening(*data["whitening"])})

    def start(self, flow: PatchFlow) -> tuple[Whitening, PatchFlow, Parameters]:
        """What `refine_images` starts from, with a copy of a flow of the same size."""
        flow = copy.deepcopy(flow).cpu()
        flow.load_state_dict(self.flow)
        return self.whitening, flow, trainable(flow)

    def require_same(self, backbone: Backbone, name: str, flow: PatchFlow) -> None:
        """Raise a ``ValueError`` if a model has another backbone, other layers or a flow of another size.

        Args:
            backbone (Backbone): The model's.
            name (str): Its timm name.
            flow (PatchFlow): The model's.
        """
        found = architecture(backbone, name, flow)
        different = [
            f"{key} is {found[key]!r} here and {self.made_for[key]!r} there"
            for key in found
            if found[key] != self.made_for[key]
        ]
        if different:
            msg = f"The initialisation was learned for another model: {'; '.join(different)}."
            raise ValueError(msg)


def architecture(backbone: Backbone, name: str, flow: PatchFlow) -> dict[str, Any]:
    """What an initialisation and a model must agree in."""
    couplings = flow.couplings.module_list
    return {
        "backbone": name.split(".", maxsplit=1)[0],
        "layers": list(backbone.layers),
        "dimensions": flow.dimensions,
        "blocks": len(couplings),
        "hidden": couplings[0].subnet[0].out_features,
    }


def learn_shared(
    data: Sequence[tuple[str | Path, tuple[int, int] | None]],
    *,
    backbone: str = OFFLINE_BACKBONE,
    layers: Sequence[str] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    batch_size: int = 32,
    memory_limit_mb: float = 2048,
    progress: bool = True,
) -> SharedInitialisation:
    """Meta-train over several categories, an episode from each in turn.

    Args:
        data (Sequence[tuple[str | Path, tuple[int, int] | None]]): For each category its images, as `curate` takes
            them, and the height and width they are resized to; ``None`` takes their own shape.
        backbone (str): Any timm architecture.
        layers (Sequence[str] | None): Modules of the backbone to read; ``None`` takes strides 8 and 16.
        settings (Settings | None): Of flow and meta-training; ``None`` takes what `MetaRefine` does by default.
        seed (int): Of everything random.
        batch_size (int): Images at a time in the backbone.
        memory_limit_mb (float): Of each category; past it, features go to files in a temporary folder.
        progress (bool): Show progress bars.

    Returns:
        SharedInitialisation: For `MetaRefine(init_from=...)`.

    Raises:
        FileNotFoundError: If there are no such data.
        ValueError: If there is no category, one has no readable image, or a setting can't be used.
    """
    if not data:
        msg = "There is nothing to meta-train on: give the images of at least one category."
        raise ValueError(msg)
    settings = settings or Settings()
    with progress_bars(progress) as bars:
        network = Backbone(backbone, layers)
        categories = [
            gather(
                images, network, backbone, bars, image_size=size, batch_size=batch_size, memory_limit_mb=memory_limit_mb
            )
            for images, size in data
        ]
        pairs = [(category.store, category.grid) for category in categories]
        whitening, flow, learned = learn_together(pairs, settings, seed, bars)
    flow.load_state_dict({name: value.detach() for name, value in learned.items()}, strict=False)
    run = {
        "data": [
            {"source": str(source), "images": len(c.store), "image_size": list(c.image_size)}
            for (source, _), c in zip(data, categories, strict=True)
        ],
        "seed": seed,
        "settings": settings.as_dict(),
        "versions": versions(),
    }
    return SharedInitialisation(whitening, flow.state_dict(), architecture(network, backbone, flow), run)


def learn_together(
    categories: Sequence[tuple[FeatureStore, tuple[int, int]]], settings: Settings, seed: int, progress: Progress
) -> tuple[Whitening, PatchFlow, Parameters]:
    """Meta-train on features of several categories.

    Args:
        categories (Sequence[tuple[FeatureStore, tuple[int, int]]]): Features of each, and its grid of patches.
        settings (Settings): Of flow and meta-training.
        seed (int): Of everything random.
        progress (Progress): Where bars are shown.

    Returns:
        tuple[Whitening, PatchFlow, Parameters]: The global whitening of all, the flow, and what was learned of it.
    """
    channels = categories[0][0].shape[1]
    flow = new_flow(channels, settings.dimensions, settings.blocks, settings.hidden, seed_for(seed, "flow"))
    whitening = fit_whitening([store for store, _ in categories], flow.dimensions, seed)
    images = [Images(store, whitening, grid) for store, grid in categories]
    return whitening, flow, learn_initialisation(images, flow, settings, seed, progress)
