"""Why an image has the score that it has: its worst regions, and the training images most like it there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from anomalib_metarefine.deploy.overlay import overlay
from anomalib_metarefine.deploy.page import figure, write_page
from anomalib_metarefine.features.embedding import image_score
from anomalib_metarefine.features.extract import image_tensor
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.images.reading import UnreadableImageError, read_image
from anomalib_metarefine.model.update import remembered, threshold_of
from anomalib_metarefine.settings import seed_for

if TYPE_CHECKING:
    from anomalib.models import AnomalibModule

_REGIONS, _ALIKE = 3, 3  # shown
_SIDE = 384  # pixels of a picture
_LINE = (255, 210, 0)


class Alike(NamedTuple):
    """A training image that comes near in a region.

    Attributes:
        path (str): Where it was in training.
        kept (bool): Whether it was learned from.
        distance (float): Mean over the patches of the region, in the units of the features.
    """

    path: str
    kept: bool
    distance: float


@dataclass(frozen=True)
class Region:
    """Patches that lie together and count for the score.

    Attributes:
        mask (np.ndarray): ``[rows x columns]`` of the grid.
        share (float): Of the score.
        alike (list[Alike]): Training images, the most alike first.
    """

    mask: np.ndarray
    share: float
    alike: list[Alike]


@dataclass(frozen=True)
class Explanation:
    """Why an image has its score; scores are raw, see `PatchDensity`.

    Attributes:
        path (str): The image.
        score (float): Of the image.
        threshold (float): Above it, an image is anomalous.
        without (float): Score without the patches of the first region.
        heat (np.ndarray): ``[rows x columns]`` patch scores.
        regions (list[Region]): The one that counts most first.
        variant (int): Which of the variants it was taken for, from 0.
        variants (int): How many there are.
        bit_depth (int | None): Of the files, see `read_image`.
    """

    path: str
    score: float
    threshold: float
    without: float
    heat: np.ndarray
    regions: list[Region]
    variant: int
    variants: int
    bit_depth: int | None

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"{self.path}: score {self.score:.4g}, threshold {self.threshold:.4g}: {self._decision(self.score)}.",
            f"Without its worst region: {self.without:.4g}, {self._decision(self.without)}.",
        ]
        if self.variants > 1:
            found.append(f"Taken for variant {self.variant} of {self.variants}.")
        for number, region in enumerate(self.regions, start=1):
            found.append(f"Region {number}, {region.share:.0%} of the score, {_place(region.mask)}. Most like it:")
            found += [f"  {_caption(alike)}" for alike in region.alike]
        return found

    def picture(self, region: Region | None = None, path: str | None = None) -> Image.Image | None:
        """The image with its heat map and outlined regions; or a training image with one region outlined.

        Args:
            region (Region | None): ``None`` outlines all regions.
            path (str | None): Another image than the explained one.

        Returns:
            Image.Image | None: ``None`` if the file is not there, or can't be read any more.
        """
        try:
            pixels = read_image(path or self.path, self.bit_depth).pixels
        except (OSError, UnreadableImageError):
            return None
        if path is None:
            low, high = float(np.median(self.heat)), float(self.heat.max())
            pixels = overlay(pixels, ((self.heat - low) / ((high - low) or 1.0)).clip(0, 1), 0.35) / 255
        picture = Image.fromarray((255 * pixels).round().astype(np.uint8))
        picture.thumbnail((_SIDE, _SIDE))
        for one in self.regions if region is None else [region]:
            picture = _outlined(picture, one.mask)
        return picture

    def write_page(self, page: str | Path) -> Path:
        """Write all of it as one self-contained HTML file."""
        first, *rest = self.lines()[: 2 + (self.variants > 1)]
        body = figure(self.picture(), first) + "".join(f"<p>{line}</p>" for line in rest)
        for number, region in enumerate(self.regions, start=1):
            body += f"<h2>Region {number}, {region.share:.0%} of the score</h2><div class='row'>"
            body += figure(self.picture(region), "this image")
            body += "".join(figure(self.picture(region, alike.path), _caption(alike)) for alike in region.alike)
            body += "</div>"
        return write_page(Path(page), f"Why {Path(self.path).name} has its score", body)

    def _decision(self, score: float) -> str:
        return "anomalous" if score > self.threshold else "normal"


@torch.no_grad()
def explain(model: AnomalibModule, path: str | Path) -> Explanation:
    """Why an image has the score that it has.

    Args:
        model (AnomalibModule): A trained MetaRefine with a memory.
        path (str | Path): The image.

    Raises:
        OSError: If it can't be opened.
        ValueError: If it can't be read as an image, or the model does not remember its training images.
    """
    memory, refinement = remembered(model)
    path = str(path)
    image = model.eval().pre_processor.transform(image_tensor(path, model.bit_depth)).unsqueeze(0)
    embeddings, _ = model.model.embed(image.to(model.device))
    bits = model.model.scorer(embeddings).cpu()
    store = FeatureStore()
    store.add([path], embeddings)
    if not len(store):
        msg = f"{path} can't be explained: {store.left_out[path]}."
        raise ValueError(msg)
    sha256 = read_image(path, model.bit_depth).sha256
    tail = max(1, round(model.settings.tail * bits.shape[1]))
    others = np.array([i for i, known in enumerate(refinement.paths) if model.training_images.get(known) != sha256])
    images = memory.take(others).with_images(store.images()).images([*(refinement.paths[i] for i in others), path])
    neighbours = NearestImages(
        images.store, memory.grid, seed_for(model.provenance["seed"], "references"), model.settings.neighbour_window,
        model.settings.references, looked=images.looked, rows=np.array([len(others)]), axes=memory.axes,
    )  # fmt: skip
    counted = np.zeros(bits.shape[1], dtype=bool)
    counted[bits[0].topk(tail).indices.numpy()] = True
    labels, count = ndimage.label(images.places.on_grid(counted[None], False)[0], np.ones((3, 3)))
    heat = images.places.on_grid(bits.numpy(), float(bits.min()))[0]
    looked = slice(None) if images.looked is None else images.looked
    shares = ndimage.sum_labels(heat, labels, range(1, count + 1)) / heat[labels > 0].sum()
    worst = 1 + np.argsort(-shares, kind="stable")
    rest = bits[0][torch.from_numpy((labels != worst[0]).ravel()[looked])].sort(descending=True).values
    regions = [
        Region(
            labels == label, float(shares[label - 1]),
            _alike(neighbours, (labels == label).ravel()[looked], others, model),
        )
        for label in worst[:_REGIONS]
    ]  # fmt: skip
    variants = memory.variants.numpy()[others]
    nearest = neighbours.images[0, :, 0]
    return Explanation(
        path, float(image_score(bits, model.settings.tail)), threshold_of(model),
        float(rest[:tail].mean()) if len(rest) else float("nan"), heat, regions,
        int(np.bincount(variants[nearest[nearest < len(others)]], minlength=1).argmax()),
        int(memory.variants.max()) + 1, model.bit_depth,
    )  # fmt: skip


def _alike(neighbours: NearestImages, patches: np.ndarray, rows: np.ndarray, model: AnomalibModule) -> list[Alike]:
    """Images by their mean distance in some patches; where one is not among the nearest, the farthest stands for it."""
    distances, images = neighbours.distances[0, patches].astype(np.float32), neighbours.images[0, patches]
    means = {}
    for image in np.unique(images[np.isfinite(distances)]):
        found = np.where(images == image, distances, np.inf).min(1)
        means[int(image)] = float(np.where(np.isfinite(found), found, distances.max(1)).mean())
    nearest = sorted(means, key=means.__getitem__)[:_ALIKE]
    known = model.refinement
    return [Alike(known.paths[rows[i]], known.kept[rows[i]], means[i]) for i in nearest]


def _caption(alike: Alike) -> str:
    there = "" if Path(alike.path).is_file() else ", no longer there"
    return f"{alike.path} ({'kept' if alike.kept else 'rejected'}, distance {alike.distance:.3g}{there})"


def _place(mask: np.ndarray) -> str:
    """Where a region is, in per cent of height and width."""
    text = []
    for name, axis, size in (("from the top", 1, mask.shape[0]), ("from the left", 0, mask.shape[1])):
        found = np.flatnonzero(mask.any(axis))
        text.append(f"{found[0] / size:.0%} to {(found[-1] + 1) / size:.0%} {name}")
    return ", ".join(text)


def _outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    large = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)) > 0
    drawn = np.array(picture)
    drawn[large & ~ndimage.binary_erosion(large, iterations=2, border_value=1)] = _LINE
    return Image.fromarray(drawn)
