"""The loss around the flow's initialisation before and after meta-training, on real images.

    python -m studies.landscape FOLDER --out landscape

What figure 3 of Aqeel et al. shows, with sharpness as numbers. Before: the untrained flow. After: what MAML made of it.
Both are measured on the same patches, along the same directions. These are normalised by the meta-learned weights: the
last layers of the untrained flow are zero and have no length of their own. One unit is then as far as meta-training
has brought these layers.

References:
    - Aqeel et al., "Meta Learning-Driven Iterative Refinement for Robust Anomaly Detection in Industrial Inspection",
      arXiv 2503.01569.
    - Li et al., "Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from anomalib_metarefine.density.patch_density import flow_loss, trainable
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE, Backbone
from anomalib_metarefine.features.gather import gather, versions
from anomalib_metarefine.meta.episodes import PatchBatch, draw_batch
from anomalib_metarefine.progress import progress_bars
from anomalib_metarefine.refinement.fitting import variant_pools
from anomalib_metarefine.settings import Settings, seed_for
from studies.common import begin
from studies.drawing import Picture, canvas, look
from studies.loss_surface import largest_eigenvalue, random_direction, rises, surface

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from anomalib_metarefine.meta.maml import Parameters
    from studies.common import Features

_LEVELS = 14  # of the contours
_SAME = 0.05  # a smaller relative change is called none


class Around(NamedTuple):
    """The loss around some parameters, in bits per dimension.

    Attributes:
        loss (float): There.
        rises (np.ndarray): On the sphere, ``[K]``; see `rises`.
        eigenvalue (float): The largest of the Hessian over all parameters.
        surface (np.ndarray): Rise on the plane, ``[P x P]``.
    """

    loss: float
    rises: np.ndarray
    eigenvalue: float
    surface: np.ndarray


@dataclass(frozen=True)
class Landscape:
    """The loss before and after meta-training.

    Attributes:
        before (Around): Around the untrained flow.
        after (Around): Around the meta-learned initialisation.
        steps (np.ndarray): Places along both axes of the plane, ``[P]``, in lengths of the meta-learned weights.
        run (dict[str, object]): What was run: source, settings, versions.
    """

    before: Around
    after: Around
    steps: np.ndarray
    run: dict[str, object]

    @property
    def verdict(self) -> str:
        """Two lines: on the sphere, and at the initialisation itself."""
        before, after = self.before, self.after
        sphere = _compare(before.rises.mean(), after.rises.mean())
        curvature = _compare(before.eigenvalue, after.eigenvalue)
        return (
            f"At a distance of {self.steps[-1]:g}, the loss {_spread(before.rises)} bits per dimension before "
            f"meta-training and {_spread(after.rises)} after: {sphere}.\n"
            f"The largest eigenvalue of the Hessian is {before.eigenvalue:.3g} before and {after.eigenvalue:.3g} "
            f"after: {curvature}."
        )

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``landscape.json``, ``landscape.svg`` and ``landscape.png``, the same bytes for the same landscape.

        Args:
            folder (str | Path): Made if it does not exist.

        Returns:
            list[Path]: The files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "landscape.json"
        found = {"before": _plain(self.before), "after": _plain(self.after), "steps": self.steps.tolist()}
        file.write_text(json.dumps({**self.run, **found}, indent=1) + "\n", encoding="utf-8")
        with look():
            picture = Picture("landscape", "The loss before and after meta-training", self.verdict, self._figure())
            return [file, *picture.save(folder)]

    def _figure(self) -> Figure:
        figure, axes = canvas(9, 4.2, 1, 2, sharex=True, sharey=True)
        panels = {"before: the untrained flow": self.before, "after meta-training": self.after}
        surfaces = np.stack([around.surface for around in panels.values()])
        levels = MaxNLocator(_LEVELS).tick_values(surfaces.min(), surfaces.max())
        # White where the loss is that of the centre, orange where it is higher, purple where it is lower.
        norm = Normalize(-np.abs(levels).max(), np.abs(levels).max())
        for ax, (title, around) in zip(axes.flat, panels.items(), strict=True):
            # Rows of the surface go along the first direction: the x-axis.
            drawn = (self.steps, self.steps, around.surface.T, levels)
            filled = ax.contourf(*drawn, cmap="PuOr_r", norm=norm)
            ax.contour(*drawn, colors="#555555", linewidths=0.4, linestyles="solid")
            ax.plot(0, 0, "k+", markersize=9)
            ax.set_title(f"{title}\nloss {around.loss:.4f}, eigenvalue {around.eigenvalue:.3g}", fontsize="medium")
            ax.set_xlabel("first direction, lengths of the weights")
            ax.set_xticks(np.linspace(self.steps[0], self.steps[-1], 5))
            ax.set_yticks(np.linspace(self.steps[0], self.steps[-1], 5))
            ax.set_aspect("equal")
            ax.grid(visible=False)
        axes[0, 0].set_ylabel("second direction, lengths of the weights")
        scale = {"label": "rise of the loss over that at +,\nbits per dimension", "format": "{x:g}", "shrink": 0.85}
        figure.colorbar(filled, ax=axes, **scale)
        return figure


def loss_landscape(
    data: str | Path,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    points: int = 21,
    radius: float = 1.0,
    directions: int = 20,
    patches: int = 4096,
    **settings: float,
) -> Landscape:
    """Meta-train on images, and look at the loss around the initialisation before and after.

    The loss is the one that meta-training adapts with, on patches of the images that it was trained on.

    Args:
        data (str | Path): Images, as `curate` takes them.
        image_size (tuple[int, int] | None): Height and width in pixels; ``None`` takes the shape of the images, at the
            area of 256 x 256 pixels.
        seed (int): Of everything random.
        points (int): Along each axis of the plane; odd, so that its centre is one of them.
        radius (float): Of the sphere, and half the width of the plane, in lengths of the meta-learned weights.
        directions (int): Random ones to the sphere, at least 2: the axes of the plane.
        patches (int): That the loss is measured on.
        **settings (float): Of `MetaRefine`, where they differ from the defaults: ``meta_steps``, ``meta_lr``.

    Returns:
        Landscape: Numbers and figure.
    """
    with progress_bars(enabled=True) as bars:
        gathered = gather(data, Backbone(OFFLINE_BACKBONE), OFFLINE_BACKBONE, bars, image_size=image_size)
    chosen = Settings(**settings)
    steps = np.linspace(-radius, radius, points)
    before, after = _measure((gathered.store, gathered.grid), chosen, seed, steps, directions, patches)
    run = {
        "source": str(data),
        "images": len(gathered.store),
        "seed": seed,
        "radius": radius,
        "directions": directions,
        "patches": patches,
        "image_size": list(gathered.image_size),
        "settings": chosen.as_dict(),
        "versions": versions(),
    }
    return Landscape(before, after, steps, run)


def _measure(
    features: Features, settings: Settings, seed: int, steps: np.ndarray, directions: int, patches: int
) -> tuple[Around, Around]:
    images, flow, learned = begin(features, seed, settings)
    pool = variant_pools(images, settings, seed)[0]
    generator = torch.Generator().manual_seed(seed_for(seed, "landscape"))
    drawn = draw_batch(*pool, torch.arange(len(pool.images)), patches, generator)
    # Rises of a millionth of the loss would drown in the rounding of single precision.
    batch = PatchBatch(drawn.patches.double(), drawn.positions.double())
    loss = flow_loss(flow.double(), settings.trim)
    before, after = trainable(flow), {name: value.double() for name, value in learned.items()}
    # As Li et al. do: biases, and the global scales and offsets of the couplings, stay where they are.
    weights = {name: value for name, value in after.items() if name.endswith(".weight")}
    ways = [random_direction(weights, generator) for _ in range(directions)]
    start = generator.get_state()

    def around(parameters: Parameters) -> Around:
        generator.set_state(start)
        return Around(
            loss(parameters, batch).item(),
            rises(loss, parameters, batch, ways, float(steps[-1])).numpy(),
            largest_eigenvalue(loss, parameters, batch, generator),
            surface(loss, parameters, batch, (ways[0], ways[1]), steps.tolist()).numpy(),
        )

    return around(before), around(after)


def _compare(before: float, after: float) -> str:
    """In words; a place that the loss falls from, to both sides, is not flat."""
    if min(before, after) <= 0:
        return "where the loss falls there is no minimum, and no sharpness to compare"
    if abs(after - before) <= _SAME * max(before, after):
        return "about as sharp"
    return f"{max(before, after) / min(before, after):.1f} times {'flatter' if after < before else 'sharper'}"


def _spread(rises: np.ndarray) -> str:
    mean = rises.mean()
    return f"{'rises' if mean > 0 else 'falls'} by {abs(mean):.2g} ± {rises.std(ddof=1):.1g}"


def _plain(around: Around) -> dict[str, object]:
    return {
        "loss": around.loss,
        "rise_mean": around.rises.mean(),
        "rise_sd": around.rises.std(ddof=1),
        "largest_eigenvalue": around.eigenvalue,
        "surface": around.surface.tolist(),
    }


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", metavar="DATA", help="images, as `metarefine curate` takes them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the figure and its numbers")
    add("--image-size", type=int, nargs=2, metavar=("H", "W"), help="in pixels; default: the shape of the images")
    add("--seed", type=int, default=0, help="of everything random")
    add("--points", type=int, default=21, metavar="N", help="along each axis of the surface, odd")
    add("--radius", type=float, default=1.0, metavar="R", help="how far to look, in lengths of the weights")
    add("--directions", type=int, default=20, metavar="N", help="random ones that sharpness is a mean over")
    add("--meta-steps", type=int, default=10, metavar="N", help="outer steps")
    options = vars(parser.parse_args(argv))
    out, size = options.pop("out"), options.pop("image_size")
    found = loss_landscape(image_size=tuple(size) if size else None, **options)
    written = found.write(out)
    print(found.verdict)
    print(f"{out.resolve()}: {', '.join(sorted(file.name for file in written))}")


if __name__ == "__main__":
    main()
