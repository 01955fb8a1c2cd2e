"""From embeddings to a density of clean patches and a decision about every image.

Each stage is a function of its inputs and of a seed of its own. By default the score that images are rejected by is the
sum of two: the likelihood under the density of the kept images, a flow adapted in every round from its meta-learned
initialisation; and the distance to the nearest other images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.density.patch_density import new_flow
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.refinement.fitting import (
    Images,
    fit_density,
    fit_whitening,
    gaussian_scores,
    image_scores,
    learn_initialisation,
    patch_scores,
)
from anomalib_metarefine.refinement.likeness import FEWEST_IMAGES, deviations, likeness
from anomalib_metarefine.refinement.patches import LEAST_REGION, keeps_order, usual_patches
from anomalib_metarefine.refinement.rounds import Refinement, Round, record, run_rounds
from anomalib_metarefine.refinement.rules import get_rule
from anomalib_metarefine.refinement.scales import Scales
from anomalib_metarefine.refinement.scores import hybrid, standardised
from anomalib_metarefine.refinement.structure import (
    GivenVariants,
    Structure,
    find_structure,
    folder_names,
    given_variants,
)
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from rich.progress import Progress

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.density.patch_density import Parameters, PatchDensity
    from anomalib_metarefine.features.embedding import Whitening
    from anomalib_metarefine.features.store import FeatureStore


@dataclass(frozen=True)
class Scored(Scales):
    """Scores as a rule sees them, and where they come from.

    Attributes:
        parts (dict[str, np.ndarray]): What the scores are made of, ``[N]`` each.
        deviations (np.ndarray): ``[N x D]``, see `likeness.deviations`; ``[N x 0]`` where images were not compared.
    """

    parts: dict[str, np.ndarray] = field(default_factory=dict)
    deviations: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class Result:
    """What the engine found about ``N`` images of ``P`` patches.

    Attributes:
        refinement (Refinement): Decisions, scores and rounds, as they are kept in a checkpoint.
        scales (Scored): Final scores and likeness.
        structure (Structure): What kind of folder it is.
        images (Images): What was looked at.
        density (PatchDensity): Fitted on the kept images.
        initial (Parameters): Where the flow of the density began.
        maps (torch.Tensor): ``[N x P]`` patch scores, bits per dimension, of fitted patches as if left out.
        distances (np.ndarray | None): ``[N x P]`` distance to the nearest other kept images; ``None`` if not compared.
        learned (np.ndarray): ``[N x P]`` mask of the patches that kept images were learned from.
        usual (np.ndarray): ``[N x P]`` mask of the patches that look usual for their place.
        axes (tuple[torch.Tensor, torch.Tensor] | None): See `NearestImages`; ``None`` if images were not compared.
    """

    refinement: Refinement
    scales: Scored
    structure: Structure
    images: Images
    density: PatchDensity
    initial: Parameters
    maps: torch.Tensor
    distances: np.ndarray | None
    learned: np.ndarray
    usual: np.ndarray
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
    rule = get_rule(settings.rule)
    given = _given(store, settings, labels)
    neighbours, structure = _compare(store, grid, given, settings, seed, progress, looked)
    images, flow, initial = _beginning(store, grid, structure.variants, looked, settings, seed, progress, start, log)
    score = _Scorer(images, flow, initial, neighbours, structure, settings, seed, answers or {})
    task = progress.add_task("refinement", total=settings.rounds + 1)

    def report(number: int, outcome: Round) -> None:
        text = f"refinement, round {number}: {outcome.rejected} rejected ({outcome.rejected / len(store):.1%})"
        progress.update(task, advance=1, description=text)
        log({"refine/rejected": float(outcome.rejected)}, number)

    rounds = run_rounds(score, len(store), rule, settings.rounds, answers, report)
    learned, usual = score.patches_to_learn(rounds.kept)
    density = fit_density(images, rounds.kept, learned, flow, initial, settings, seed)
    maps = patch_scores(images, density, rounds.kept, learned)
    progress.update(task, completed=settings.rounds + 1)
    left_out = 1 - float(learned[rounds.kept].mean())
    structure = replace(structure, unlearned=int((rounds.kept & (images.groups(rounds.kept) < 0)).sum()))
    refinement = record(rounds, store.paths, structure.describe(), store.left_out, left_out)
    distances = None if neighbours is None else neighbours.episodic(rounds.kept)[0].numpy()
    axes = None if neighbours is None else neighbours.axes
    return Result(
        refinement, rounds.scales, structure, images, density, initial, maps, distances, learned, usual, axes
    )  # fmt: skip


def scored(
    images: Images,
    likelihood: np.ndarray | None,
    distances: torch.Tensor | None,
    kept: np.ndarray,
    structure: Structure,
    settings: Settings,
    answers: Mapping[int, bool],
) -> Scored:
    """The parts of a score put together, and what images share with suspicious ones.

    Args:
        images (Images): All ``N`` images.
        likelihood (np.ndarray | None): ``[N]`` scores under a density; ``None`` leaves them out.
        distances (torch.Tensor | None): ``[N x P]`` to the nearest other images; ``None`` if they were not compared.
        kept (np.ndarray): ``[N]`` mask of the images that count as normal.
        structure (Structure): What kind of folder it is.
        settings (Settings): See `MetaRefine`.
        answers (Mapping[int, bool]): Rows that a person has decided to keep (true) or to reject.

    Returns:
        Scored: As a rule sees it.
    """
    parts = {} if likelihood is None else {"likelihood": likelihood}
    if distances is None:
        return Scored(hybrid(parts, {"likelihood": 1.0}, kept), kept=kept, parts=parts)
    if settings.neighbour_weight > 0:
        parts["neighbours"] = image_scores(distances, settings.neighbour_tail)
    weights = {"likelihood": settings.likelihood_weight, "neighbours": settings.neighbour_weight}
    variants, comparable = structure.variants, structure.comparable
    scores = hybrid(parts, weights, kept, variants)
    unusual = deviations(images.chunks(), distances, kept, variants)
    if settings.likeness_weight == 0 or len(scores) < FEWEST_IMAGES:
        return Scored(scores, None, kept, comparable, parts=parts, deviations=unusual)

    def with_likeness(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alike, trust = likeness(unusual, values, answers)
        alike = standardised(alike, kept, variants)
        return standardised(values + settings.likeness_weight * trust * alike, kept, variants), alike

    # All of it orders the images; distance and likeness alone reject them, see `Scales`.
    total, alike = with_likeness(scores)
    distance = None
    if len(parts) > 1:
        distance, alike = with_likeness(standardised(parts["neighbours"], kept, variants))
    alike = np.where(structure.judged, alike, np.nan)
    return Scored(total, alike, kept, comparable, distance, parts, unusual)


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

    def __call__(self, kept: np.ndarray) -> Scored:
        """Fit on the images of a mask ``[N]``, score all."""
        likelihood = None
        if self.neighbours is None or self.settings.likelihood_weight > 0:
            likelihood = image_scores(self._maps(kept), self.settings.tail)
        distances = None if self.neighbours is None else self.neighbours.episodic(kept)[0]
        return scored(self.images, likelihood, distances, kept, self.structure, self.settings, self.answers)

    def patches_to_learn(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Masks ``[N x P]`` of the patches to learn from, and of those that look usual for their place.

        A dirty image that no rule rejects is still unusual somewhere: on KolektorSDD with 10 % dirty images, leaving
        such regions out after the rounds is worth 4 points of image AUROC. Each variant has its own usual, and a
        small one none. Not so where images would change their order without the unusual regions.
        """
        usual = np.ones((len(kept), len(self.images.positions)), dtype=bool)
        learned = usual.copy()
        if self.neighbours is None or self.settings.patch_fence == 0 or not self.structure.comparable:
            return learned, usual
        distances = self.neighbours.episodic(kept)[0].numpy()
        for variant in np.unique(self.structure.variants):
            own = self.structure.judged & (self.structure.variants == variant)
            self._leave_out(own, own & kept, distances, learned, usual)
        return learned, usual

    def _leave_out(
        self, own: np.ndarray, kept: np.ndarray, distances: np.ndarray, learned: np.ndarray, usual: np.ndarray
    ) -> None:
        """Mark the unusual patches of a variant, and what lies around them, in the masks ``[N x P]`` of all images."""
        looks_usual = np.ones(usual.shape, dtype=bool)
        looks_usual[kept] = usual_patches(distances[kept], self.settings.patch_fence)
        if looks_usual.all():
            return
        everything, outside = np.ones(usual.shape, dtype=bool), np.ones(usual.shape, dtype=bool)
        outside[own] = self.images.outside_regions(looks_usual[own], LEAST_REGION)
        before, after = (gaussian_scores(self.images, kept, mask, self.settings) for mask in (everything, outside))
        if keeps_order(before, after):
            learned &= outside
            usual &= looks_usual

    def _maps(self, kept: np.ndarray) -> torch.Tensor:
        everyone = np.ones((len(kept), len(self.images.positions)), dtype=bool)
        density = fit_density(self.images, kept, everyone, self.flow, self.initial, self.settings, self.seed)
        return patch_scores(self.images, density, kept, everyone)


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
    variants: np.ndarray,
    looked: np.ndarray | None,
    settings: Settings,
    seed: int,
    progress: Progress,
    start: tuple[Whitening, PatchFlow, Parameters] | None,
    log: Callable[[dict[str, float], int], None],
) -> tuple[Images, PatchFlow, Parameters]:
    if start is not None:
        whitening, flow, initial = start
        return Images(store, whitening, grid, variants, looked), flow, initial
    flow = new_flow(store.shape[1], settings.dimensions, settings.blocks, settings.hidden, seed_for(seed, "flow"))
    images = Images(store, fit_whitening([store], flow.dimensions, seed), grid, variants, looked)
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
        return None, Structure("aligned", float("nan"), float("nan"), variants, names)
    task = progress.add_task("comparing images", total=count)
    neighbours = NearestImages(
        store,
        grid,
        seed_for(seed, "references"),
        settings.neighbour_window,
        settings.references,
        on_images=lambda done: progress.update(task, advance=done),
        looked=looked,
        variants=given.numbers if given else None,
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
