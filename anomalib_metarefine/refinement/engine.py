"""From embeddings to a density of clean patches and a decision about every image.

Each stage is a function of its inputs and of a seed of its own. By default the score that images are rejected by is the
sum of two: the likelihood under the density of the kept images, a flow adapted in every round from its meta-learned
initialisation; and the distance to the nearest other images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.density.patch_density import new_flow, trainable
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.refinement.fitting import Images, fit_density, fit_whitening, learn_initialisation, likelihoods
from anomalib_metarefine.refinement.learned import choose_patches
from anomalib_metarefine.refinement.likeness import FEWEST_IMAGES, keep_deviations, likeness
from anomalib_metarefine.refinement.rounds import Refinement, Round, record, run_rounds
from anomalib_metarefine.refinement.rules import get_rule
from anomalib_metarefine.refinement.scales import Scales
from anomalib_metarefine.refinement.scores import hybrid, standardised
from anomalib_metarefine.refinement.structure import Structure, find_structure
from anomalib_metarefine.refinement.variants import GivenVariants, folder_names, given_variants
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from rich.progress import Progress

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.density.patch_density import Parameters, PatchDensity
    from anomalib_metarefine.features.embedding import Whitening
    from anomalib_metarefine.features.shards import Shard
    from anomalib_metarefine.features.store import FeatureStore


@dataclass(frozen=True)
class Scored(Scales):
    """Scores as a rule sees them, and where they come from.

    Attributes:
        parts (dict[str, np.ndarray]): What the scores are made of, ``[N]`` each.
    """

    parts: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What the engine found about ``N`` images of ``P`` patches.

    What it found about patches stays in the shards of ``images.store``, ``[n x P]`` each: ``maps``, scores in bits per
    dimension, those of fitted patches as if left out; ``learned`` and ``usual``, masks of the patches that kept images
    were learned from and of those that look usual for their place; where images were compared, ``distances`` to the
    nearest other kept ones, and ``deviations``, ``[n x D]``, see `keep_deviations`.

    Attributes:
        refinement (Refinement): Decisions, scores and rounds, as they are kept in a checkpoint.
        scales (Scored): Final scores and likeness.
        structure (Structure): What kind of folder it is.
        images (Images): What was looked at.
        density (PatchDensity): Fitted on the kept images.
        initial (Parameters): Where the flow of the density began.
        likelihood (np.ndarray): ``[N]`` scores under the density, those of fitted images as if left out.
        axes (tuple[torch.Tensor, torch.Tensor] | None): See `NearestImages`; ``None`` if images were not compared.
    """

    refinement: Refinement
    scales: Scored
    structure: Structure
    images: Images
    density: PatchDensity
    initial: Parameters
    likelihood: np.ndarray
    axes: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def kept(self) -> np.ndarray:
        """``[N]`` mask of the images that the density was fitted on."""
        return np.array(self.refinement.kept)


def refine_images(
    store: FeatureStore,
    grid: tuple[int, int],
    settings: Settings,
    seed: int,
    progress: Progress,
    *,
    start: tuple[Whitening, PatchFlow, Parameters] | None = None,
    answers: Mapping[int, bool] | None = None,
    labels: Sequence[str] | None = None,
    looked: np.ndarray | None = None,
    log: Callable[[dict[str, float], int], None] = lambda _figures, _step: None,
) -> Result:
    """Meta-train, find out what kind of folder it is, refine, and fit the final density.

    Args:
        store (FeatureStore): Embeddings of all training images.
        grid (tuple[int, int]): Rows and columns of patches.
        settings (Settings): See `MetaRefine`.
        seed (int): Of everything random.
        progress (Progress): Where bars are shown.
        start (tuple[Whitening, PatchFlow, Parameters] | None): A meta-learned initialisation with the whitening and the
            flow that it was learned with; ``None`` learns one on the store.
        answers (Mapping[int, bool] | None): Rows that a person has decided to keep (true) or to reject.
        labels (Sequence[str] | None): The user's name for the variant of each row, for ``variants="column"``.
        looked (np.ndarray | None): See `Images`.
        log (Callable[[dict[str, float], int], None]): Receives figures and their step.

    Returns:
        Result: By row of the store.

    Raises:
        ValueError: If variants are to be those of a column, and there is none.
    """
    store, rule = store.fresh, get_rule(settings.rule)
    given = _given(store, settings, labels)
    neighbours, structure = _compare(store, grid, given, settings, seed, progress, looked)
    images, flow, initial = _beginning(store, grid, structure, looked, settings, seed, progress, start, log)
    score = _Scorer(images, flow, initial, neighbours, structure, settings, seed, answers or {})
    task = progress.add_task("refinement", total=settings.rounds + 1)

    def report(number: int, outcome: Round) -> None:
        text = f"refinement, round {number}: {outcome.rejected} rejected ({outcome.rejected / len(store):.1%})"
        progress.update(task, advance=1, description=text)
        log({"refine/rejected": float(outcome.rejected)}, number)

    rounds = run_rounds(score, len(store), rule, settings.rounds, answers, report)
    choose_patches(images, structure, rounds.kept, settings, neighbours is not None)
    density = score.fit(rounds.kept, "learned")
    likelihood = likelihoods(images, density, rounds.kept, "learned", keep="maps")
    progress.update(task, completed=settings.rounds + 1)
    left_out = 1 - sum(store.map(_learned, None, rounds.kept)) / (rounds.kept.sum() * len(images.positions))
    structure = replace(structure, unlearned=int((rounds.kept & (images.groups(rounds.kept) < 0)).sum()))
    refinement = record(rounds, store.paths, structure.describe(), store.left_out, float(left_out))
    axes = None if neighbours is None else neighbours.axes
    return Result(refinement, rounds.scales, structure, images, density, initial, likelihood, axes)


def _learned(shard: Shard, _shared: None, kept: np.ndarray) -> int:
    return int(shard.read("learned")[kept].sum())


def scored(
    images: Images,
    likelihood: np.ndarray | None,
    distances: np.ndarray | None,
    kept: np.ndarray,
    structure: Structure,
    settings: Settings,
    answers: Mapping[int, bool],
) -> Scored:
    """The parts of a score put together, and what images share with suspicious ones.

    Args:
        images (Images): All ``N`` images; if they were compared, their shards have ``distances`` of patches.
        likelihood (np.ndarray | None): ``[N]`` scores under a density; ``None`` leaves them out.
        distances (np.ndarray | None): ``[N]`` to the nearest other images; ``None`` if they were not compared.
        kept (np.ndarray): ``[N]`` mask of the images that count as normal.
        structure (Structure): What kind of folder it is.
        settings (Settings): See `MetaRefine`.
        answers (Mapping[int, bool]): Rows that a person has decided to keep (true) or to reject.

    Returns:
        Scored: As a rule sees it.
    """
    parts = {} if likelihood is None else {"likelihood" if images.aligned else "memory": likelihood}
    if distances is not None:
        keep_deviations(images, kept, structure.variants)
    if distances is None or not images.aligned:  # place by place, images are not or can't be compared
        total = hybrid(parts, dict.fromkeys(parts, 1.0), kept)
        return Scored(total, kept=kept, comparable=structure.comparable, parts=parts)
    if settings.neighbour_weight > 0:
        parts["neighbours"] = distances
    weights = {"likelihood": settings.likelihood_weight, "neighbours": settings.neighbour_weight}
    variants, comparable = structure.variants, structure.comparable
    scores = hybrid(parts, weights, kept, variants)
    if settings.likeness_weight == 0 or len(scores) < FEWEST_IMAGES:
        return Scored(scores, None, kept, comparable, parts=parts)
    # All of it orders the images; distance and likeness alone reject them, see `Scales`.
    ordered = [scores] if len(parts) == 1 else [scores, standardised(parts["neighbours"], kept, variants)]
    totals = []
    for values, (alike, trust) in zip(ordered, likeness(images.store, ordered, answers), strict=True):
        alike = standardised(alike, kept, variants)  # noqa: PLW2901
        totals.append(standardised(values + settings.likeness_weight * trust * alike, kept, variants))
    distance = totals[1] if len(totals) > 1 else None
    return Scored(totals[0], np.where(structure.judged, alike, np.nan), kept, comparable, distance, parts)


@dataclass(frozen=True)
class _Scorer:
    """Scores all images against those of a mask; what it needs for that stays the same from round to round."""

    images: Images
    flow: PatchFlow
    initial: Parameters
    neighbours: NearestImages | None
    structure: Structure
    settings: Settings
    seed: int
    answers: Mapping[int, bool]
    memories: dict[bytes, PatchDensity] = field(default_factory=dict)

    def fit(self, kept: np.ndarray, learned: str | None = None) -> PatchDensity:
        """Fit on the images of a mask ``[N]``; see `fit_density`."""
        asked = kept.tobytes()
        if asked in self.memories:
            return self.memories[asked]
        density = fit_density(self.images, kept, learned, self.flow, self.initial, self.settings, self.seed)
        if density.memory is not None:  # takes seconds, and leaves no patches out: the last round's is the final one
            self.memories[asked] = density
        return density

    def __call__(self, kept: np.ndarray) -> Scored:
        """Fit on the images of a mask ``[N]``, score all."""
        likelihood = distances = None
        if self.neighbours is None or self.settings.likelihood_weight > 0 or not self.images.aligned:
            likelihood = likelihoods(self.images, self.fit(kept), kept)
        if self.neighbours is not None:
            distances = self.neighbours.keep_distances(kept, self.settings.neighbour_tail)
        return scored(self.images, likelihood, distances, kept, self.structure, self.settings, self.answers)


def _given(store: FeatureStore, settings: Settings, labels: Sequence[str] | None) -> GivenVariants | None:
    if settings.variants == "folders":
        return given_variants(folder_names(store.paths))
    if settings.variants != "column":
        return None
    if labels is None:
        msg = "variants=column needs a table of images with a column `variant`, and there is none. "
        raise ValueError(msg + "Add it, or take variants=folders, which every training can.")
    return given_variants(labels)


def _beginning(
    store: FeatureStore,
    grid: tuple[int, int],
    structure: Structure,
    looked: np.ndarray | None,
    settings: Settings,
    seed: int,
    progress: Progress,
    start: tuple[Whitening, PatchFlow, Parameters] | None,
    log: Callable[[dict[str, float], int], None],
) -> tuple[Images, PatchFlow, Parameters]:
    variants, aligned = structure.variants, structure.comparable
    if start is not None:
        whitening, flow, initial = start
        return Images(store, whitening, grid, variants, looked, aligned), flow, initial
    flow = new_flow(store.shape[1], settings.dimensions, settings.blocks, settings.hidden, seed_for(seed, "flow"))
    images = Images(store, fit_whitening([store], flow.dimensions, seed), grid, variants, looked, aligned)
    if not aligned:  # the density will be a memory, without a flow
        return images, flow, trainable(flow)
    return images, flow, learn_initialisation([images], flow, settings, seed, progress, log)


def _compare(
    store: FeatureStore,
    grid: tuple[int, int],
    given: GivenVariants | None,
    settings: Settings,
    seed: int,
    progress: Progress,
    looked: np.ndarray | None,
) -> tuple[NearestImages | None, Structure]:
    """The images compared with each other, unless nothing is rejected anyway."""
    count = len(store)
    if settings.rounds == 0:
        variants, names = given or GivenVariants(np.zeros(count, dtype=int), ())
        kind = "aligned" if settings.structure == "auto" else settings.structure
        return None, Structure(kind, float("nan"), float("nan"), variants, names)
    task = progress.add_task("comparing images", total=count)
    neighbours = NearestImages(
        store,
        grid,
        seed_for(seed, "references"),
        settings.neighbour_window,
        settings.references,
        on_images=lambda done: progress.update(task, advance=done),
        looked=looked,
    )
    structure = find_structure(
        neighbours,
        settings.neighbour_tail,
        seed_for(seed, "structure"),
        settings.structure,
        given,
        look_for_variants=settings.variants == "auto",
    )
    return neighbours, structure
