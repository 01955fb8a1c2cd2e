"""Fit a model on changed images: old decisions stand and new images are judged, or all are judged anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.model.memory import Memory
from anomalib_metarefine.refinement.engine import refine_images, scored
from anomalib_metarefine.refinement.fitting import fit_density, image_scores, likelihoods
from anomalib_metarefine.refinement.patches import LEAST_REGION, is_usual, usual_limit
from anomalib_metarefine.refinement.rules import get_rule
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from rich.progress import Progress

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.density.patch_density import PatchDensity
    from anomalib_metarefine.features.store import FeatureStore
    from anomalib_metarefine.refinement.fitting import Images


@dataclass(frozen=True)
class Changed:
    """Images of a model after a change, before anything is fitted.

    Attributes:
        memory (Memory): Of all ``N`` images.
        paths (list[str]): Of the images, sorted as a training has them.
        kept (np.ndarray): ``[N]`` mask: standing decisions, and true for new images.
        fresh (np.ndarray): ``[N]`` mask of the new images.
        likelihood (np.ndarray): ``[N]`` scores under the standing density, those of old images as if left out.
        answers (dict[int, bool]): Rows that a person has decided to keep (true) or to reject.
        named (dict[int, str]): The user's name for the variant of new images, by row.
    """

    memory: Memory
    paths: list[str]
    kept: np.ndarray
    fresh: np.ndarray
    likelihood: np.ndarray
    answers: dict[int, bool]
    named: dict[int, str]


class Fit(NamedTuple):
    """A density, and what was decided about every image.

    Attributes:
        memory (Memory): Of all ``N`` images.
        density (PatchDensity): Fitted on the kept ones.
        likelihood (np.ndarray): ``[N]`` scores under it, those of fitted images as if left out.
        kept (np.ndarray): ``[N]`` mask.
        scores (np.ndarray): ``[N]``, in spreads of the kept images.
    """

    memory: Memory
    density: PatchDensity
    likelihood: np.ndarray
    kept: np.ndarray
    scores: np.ndarray


def change(
    memory: Memory,
    paths: Sequence[str],
    kept: np.ndarray,
    rows: np.ndarray,
    new: FeatureStore,
    likelihood: np.ndarray,
    answers: Mapping[str, bool],
    skipped: Collection[str] = (),
    named: Mapping[str, str] = MappingProxyType({}),
) -> Changed:
    """Put what stays and what is new in order.

    Args:
        memory (Memory): Before.
        paths (Sequence[str]): Of its images.
        kept (np.ndarray): Mask of those that were learned from.
        rows (np.ndarray): Of those that stay.
        new (FeatureStore): Images to add.
        likelihood (np.ndarray): Of the images that stay, then of the new ones; see `Changed`.
        answers (Mapping[str, bool]): See `update`.
        skipped (Collection[str]): Images, by path, that may be answered on and are not there.
        named (Mapping[str, str]): The user's name for the variant of new images, by path.

    Raises:
        ValueError: If there is an answer about an image that is not there.
    """
    found, mask = [*(paths[i] for i in rows), *new.paths], np.append(kept[rows], np.ones(len(new), dtype=bool))
    unknown = [path for path in answers if path not in found and path not in skipped]
    if unknown:
        msg = f"There is an answer about {unknown[0]}, which is neither known nor added. Expected e.g. {paths[0]}."
        raise ValueError(msg)
    if not found:
        msg = f"All {len(paths)} images would be forgotten. Expected at least one to be left."
        raise ValueError(msg)
    order = np.argsort(found, kind="stable")
    if len(new):
        rows, memory = np.append(rows, len(paths) + np.arange(len(new))), memory.with_images(new.images())
    memory = memory.take(rows[order])
    found = [found[i] for i in order]
    decided, names = ({i: of[path] for i, path in enumerate(found) if path in of} for of in (answers, named))
    return Changed(memory, found, mask[order], rows[order] >= len(paths), likelihood[order], decided, names)


def fit_standing(changed: Changed, flow: PatchFlow, settings: Settings, seed: int, bars: Progress) -> Fit:
    """Judge new images by the standing model, then fit on what is kept.

    Args:
        changed (Changed): The images.
        flow (PatchFlow): The architecture.
        settings (Settings): See `MetaRefine`.
        seed (int): Of the training.
        bars (Progress): Where bars are shown.
    """
    kept = changed.kept.copy()
    task = bars.add_task("judging and fitting", total=2)
    memory, images, neighbours = _placed(changed, settings, seed, compare=changed.memory.distances is not None)
    distances = None if memory.distances is None else memory.distances.float()
    if neighbours is not None and distances is not None:
        distances[torch.from_numpy(changed.fresh)] = neighbours.episodic(kept)[0]
        memory = replace(memory, distances=distances.half())
    structure, image_distances = memory.structure, None
    if distances is not None:
        images.store.keep(distances=distances.numpy())
        image_distances = image_scores(distances, settings.neighbour_tail)
    scales = scored(images, changed.likelihood, image_distances, kept, structure, settings, changed.answers)
    if distances is not None:
        kept = kept & ~(changed.fresh & get_rule(settings.rule).reject(scales).images)
    kept[list(changed.answers)] = list(changed.answers.values())
    if not kept.any():
        msg = f"None of the {len(kept)} images would be learned from. Expected at least one to be kept."
        raise ValueError(msg)
    learned, groups = _learned(memory, images, kept, changed.fresh, settings.patch_fence), images.groups(kept)
    for group in range(groups.max() + 1):  # places of which nothing would be left to learn
        rows = kept & (groups == group)
        learned[np.ix_(rows, ~learned[rows].any(0))] = True
    images.store.keep(learned=learned)
    density = fit_density(images, kept, "learned", flow, memory.initial, settings, seed)
    bars.advance(task)
    likelihood = likelihoods(images, density, kept, "learned")
    bars.advance(task)
    return Fit(replace(memory, learned=torch.from_numpy(learned)), density, likelihood, kept, scales.scores)


def fit_all_anew(changed: Changed, flow: PatchFlow, settings: Settings, seed: int, bars: Progress) -> Fit:
    """Refine as the training did, from its whitening and its start of the flow; arguments as in `fit_standing`."""
    memory, images, _ = _placed(changed, settings, seed)
    start, labels = (memory.whitening, flow, memory.initial), None
    if memory.names:  # those of the training, wherever new images lie
        settings, labels = replace(settings, variants="column"), [memory.names[number] for number in memory.variants]
    result = refine_images(
        images.store, images.grid, settings, seed, bars,
        start=start, answers=changed.answers, labels=labels, looked=images.looked,
    )  # fmt: skip
    found = replace(Memory.of(result), moments=memory.moments, trained=memory.trained)
    return Fit(found, result.density, result.likelihood, result.kept, np.array(result.refinement.scores))


def _learned(memory: Memory, images: Images, kept: np.ndarray, fresh: np.ndarray, fence: float) -> np.ndarray:
    """Mask ``[N x P]`` of the patches to learn from: unusual regions of new images are left out as those of old were.

    Args:
        memory (Memory): With the distances of the new images.
        images (Images): All of them.
        kept (np.ndarray): ``[N]`` mask.
        fresh (np.ndarray): ``[N]`` mask of the new images.
        fence (float): See `usual_limit`.
    """
    learned, structure = memory.learned.numpy().copy(), memory.structure
    if not memory.regions or memory.distances is None:
        return learned
    distances = memory.distances.float().numpy()
    for variant in np.unique(structure.variants[fresh & structure.judged]):
        own = structure.variants == variant
        usual = np.ones(learned.shape, dtype=bool)
        usual[own & kept] = is_usual(distances[own & kept], usual_limit(distances[own & kept], fence))
        learned[own & fresh] = images.places.outside_regions(usual[own], LEAST_REGION)[fresh[own]]
    return learned


def _placed(
    changed: Changed, settings: Settings, seed: int, compare: bool = False
) -> tuple[Memory, Images, NearestImages | None]:
    """Memory and images with every new one in a variant; the new ones compared with all, if need be or if asked.

    The user's name counts; without one, the variant that most patches find the nearest image in that has its own.
    """
    memory, rows, neighbours = changed.memory, np.flatnonzero(changed.fresh), None
    images, variants = memory.images(changed.paths), memory.variants.numpy().copy()
    unnamed = len(rows) > len(changed.named) and bool(variants.any())
    if len(rows) and (compare or unnamed):
        neighbours = NearestImages(
            images.store, images.grid, seed_for(seed, "references"), settings.neighbour_window, settings.references,
            looked=images.looked, rows=rows, axes=memory.axes,
        )  # fmt: skip
    placed, last = ~changed.fresh, None
    while unnamed and not placed.all() and last != placed.sum():
        last, usable = placed.sum(), placed[neighbours.images]
        nearest = np.take_along_axis(neighbours.images, usable.argmax(-1)[..., None], -1)[..., 0]
        for number in np.flatnonzero(~placed[rows] & usable.any((1, 2))):
            variants[rows[number]] = np.bincount(variants[nearest[number][usable[number].any(-1)]]).argmax()
            placed[rows[number]] = True
    memory = replace(memory, variants=torch.from_numpy(variants)).with_names(changed.named)
    return memory, replace(images, variants=memory.variants.numpy()), neighbours
