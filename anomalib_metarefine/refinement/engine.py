"""From embeddings to a density of clean patches and a decision about every image.

Each stage is a function of its inputs and of a seed of its own. By default the score that images are rejected by is the
sum of two: the likelihood under the density of the kept images, a flow adapted in every round from its meta-learned
initialisation; and the distance to the nearest other images. Memory stays bounded: images are whitened chunk by chunk,
and gradient steps draw their patches from a pool of limited size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from anomalib_metarefine.density.flow import bits_per_dimension, position_code
from anomalib_metarefine.density.gaussian import PositionalGaussian
from anomalib_metarefine.density.patch_density import (
    Parameters,
    PatchDensity,
    flow_loss,
    held_out,
    new_flow,
    trainable,
)
from anomalib_metarefine.features.embedding import Whitening, image_score
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.meta.episodes import Category, draw_patches
from anomalib_metarefine.meta.maml import get_learner
from anomalib_metarefine.meta.training import meta_train
from anomalib_metarefine.refinement.likeness import FEWEST_IMAGES, deviations, likeness
from anomalib_metarefine.refinement.patches import LEAST_REGION, keeps_order, outside_regions, usual_patches
from anomalib_metarefine.refinement.rounds import Refinement, Round, record, run_rounds
from anomalib_metarefine.refinement.rules import get_rule
from anomalib_metarefine.refinement.scales import Scales
from anomalib_metarefine.refinement.scores import hybrid, standardised
from anomalib_metarefine.refinement.structure import Structure, find_structure
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.progress import Progress

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.features.store import FeatureStore

_POOL = 384  # images that gradient steps draw from
_WHITENING_PATCHES = 65_536  # enough for 150 channels; more change no digit that matters


@dataclass(frozen=True)
class Images:
    """Training images as the engine sees them: ``N`` rows of a store, ``P`` patches of ``D`` whitened channels.

    Attributes:
        store (FeatureStore): Embeddings.
        whitening (Whitening): Global whitening.
        grid (tuple[int, int]): Rows and columns of patches.
    """

    store: FeatureStore
    whitening: Whitening
    grid: tuple[int, int]

    @property
    def positions(self) -> torch.Tensor:
        """Codes of the places, ``[P x 16]``."""
        return position_code(*self.grid)

    def chunks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Rows and whitened patches ``[n x P x D]``, a few images at a time; of all images by default."""
        rows = np.arange(len(self.store)) if rows is None else rows
        for part, embeddings in self.store.chunks(rows):
            yield part, self.whitening(embeddings)


@dataclass(frozen=True)
class Result:
    """What the engine found about ``N`` images of ``P`` patches.

    Attributes:
        refinement (Refinement): Decisions, scores and rounds, as they are kept in a checkpoint.
        scales (Scales): Final scores and likeness.
        parts (dict[str, np.ndarray]): What the scores are made of, ``[N]`` each.
        structure (Structure): What kind of folder it is.
        images (Images): What was looked at.
        density (PatchDensity): Fitted on the kept images.
        maps (torch.Tensor): ``[N x P]`` patch scores, bits per dimension, of fitted patches as if left out.
        usual (np.ndarray): ``[N x P]`` mask of the patches that look usual for their place.
        deviations (np.ndarray): ``[N x D]``, see `likeness.deviations`; ``[N x 0]`` where images were not compared.
    """

    refinement: Refinement
    scales: Scales
    parts: dict[str, np.ndarray]
    structure: Structure
    images: Images
    density: PatchDensity
    maps: torch.Tensor
    usual: np.ndarray
    deviations: np.ndarray

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
        log (Callable[[dict[str, float], int], None]): Receives figures and their step.

    Returns:
        Result: By row of the store.
    """
    rule, images, flow, initial = (
        get_rule(settings.rule),
        *_beginning(store, grid, settings, seed, progress, start, log),
    )
    everyone = np.ones((len(store), len(images.positions)), dtype=bool)
    parts: dict[str, np.ndarray] = {}
    neighbours, structure = _compare(images, settings, seed, progress)
    weights = {"likelihood": settings.likelihood_weight, "neighbours": settings.neighbour_weight}
    if neighbours is None:
        weights = {"likelihood": 1.0}
    unusual = np.zeros((len(store), 0))

    def score(kept: np.ndarray) -> Scales:
        nonlocal unusual
        parts.clear()
        if weights["likelihood"] > 0:
            density = fit_density(images, kept, everyone, flow, initial, settings, seed)
            parts["likelihood"] = image_scores(patch_scores(images, density, kept, everyone), settings.tail)
        if neighbours is None:
            return Scales(hybrid(parts, weights, kept))
        distances = neighbours.episodic(kept)[0]
        if settings.neighbour_weight > 0:
            parts["neighbours"] = image_scores(distances, settings.neighbour_tail)
        unusual = deviations(images.chunks(), distances, kept)
        used = {name: values for name, values in parts.items() if name in weights}
        return _with_likeness(
            hybrid(used, weights, kept, structure.variants), unusual, kept, structure, settings, answers
        )

    task = progress.add_task("refinement", total=settings.rounds + 1)

    def report(number: int, outcome: Round) -> None:
        text = f"refinement, round {number}: {outcome.rejected} rejected ({outcome.rejected / len(store):.1%})"
        progress.update(task, advance=1, description=text)
        log({"refine/rejected": float(outcome.rejected)}, number)

    rounds = run_rounds(score, len(store), rule, settings.rounds, answers, report)
    learned, usual = everyone, everyone
    alike = structure.comparable and not structure.variants.any()  # patches of a small variant are no defects
    if neighbours is not None and settings.patch_fence > 0 and alike and _none_rejected(rounds.kept, answers):
        learned, usual = _without_unusual(images, rounds.kept, neighbours, settings)
    density = fit_density(images, rounds.kept, learned, flow, initial, settings, seed)
    maps = patch_scores(images, density, rounds.kept, learned)
    progress.update(task, completed=settings.rounds + 1)
    parts["likelihood"] = image_scores(maps, settings.tail)
    refinement = record(
        rounds, store.paths, structure.describe(), store.left_out, 1 - float(learned[rounds.kept].mean())
    )
    return Result(refinement, rounds.scales, parts, structure, images, density, maps, usual, unusual)


def fit_whitening(stores: Sequence[FeatureStore], dimensions: int, seed: int) -> Whitening:
    """Global whitening of the patches of one or several stores."""
    generator = torch.Generator().manual_seed(seed_for(seed, "whitening"))
    share = _WHITENING_PATCHES // len(stores)
    return Whitening.fit(torch.cat([store.sample_patches(share, generator) for store in stores]), dimensions)


def learn_initialisation(
    categories: Sequence[Images],
    flow: PatchFlow,
    settings: Settings,
    seed: int,
    progress: Progress,
    log: Callable[[dict[str, float], int], None] = lambda _figures, _step: None,
) -> Parameters:
    """Meta-train the flow on episodes drawn from all images of one or several categories, dirty ones included.

    Returns:
        Parameters: Where every fit begins.
    """
    task = progress.add_task("meta-training", total=settings.meta_steps)

    def on_step(step: int, query_loss: float) -> None:
        progress.update(task, advance=1, description=f"meta-training, query {query_loss:.3f} bits/dim")
        log({"meta/query_bits_per_dim": query_loss}, step)

    generator = torch.Generator().manual_seed(seed_for(seed, "meta-training"))
    pools = [_category(images, settings, seed) for images in categories]
    return meta_train(pools, trainable(flow), flow_loss(flow, settings.trim), settings, generator, on_step)


def fit_density(
    images: Images,
    kept: np.ndarray,
    learned: np.ndarray,
    flow: PatchFlow,
    initial: Parameters,
    settings: Settings,
    seed: int,
) -> PatchDensity:
    """Gaussians from scratch and the flow from ``initial``: what is left out leaves no trace.

    Args:
        images (Images): All images.
        kept (np.ndarray): ``[N]`` mask of those to learn from.
        learned (np.ndarray): ``[N x P]`` mask of the patches to learn from.
        flow (PatchFlow): The architecture.
        initial (Parameters): The meta-learned initialisation.
        settings (Settings): See `MetaRefine`.
        seed (int): Of the patches drawn.
    """
    gaussian = fit_gaussian(images, kept, learned, settings.shrinkage)
    generator = torch.Generator().manual_seed(seed_for(seed, "adaptation"))
    rows = _pool_rows(kept, generator)
    pool, usable = _pool(images, rows, gaussian), torch.from_numpy(learned[rows]).nonzero()
    batches = (
        draw_patches(pool, images.positions, usable, settings.batch_patches, generator)
        for _ in range(settings.adaptation_steps)
    )
    learner = get_learner(settings.meta_backend)
    parameters = learner.adapt(flow_loss(flow, settings.trim), initial, batches, settings.inner_lr)
    return PatchDensity(images.whitening, gaussian, flow, parameters)


def fit_gaussian(images: Images, kept: np.ndarray, learned: np.ndarray, shrinkage: float) -> PositionalGaussian:
    """Positional whitening of the kept images (``[N]`` mask), of the patches ``[N x P]`` to learn from."""
    chunks = (chunk for _, chunk in images.chunks(np.flatnonzero(kept)))
    return PositionalGaussian.fit(chunks, shrinkage, torch.from_numpy(learned[kept]))


@torch.no_grad()
def patch_scores(images: Images, density: PatchDensity, kept: np.ndarray, learned: np.ndarray) -> torch.Tensor:
    """Bits per dimension of all patches, ``[N x P]``; those the density was fitted on as if left out."""
    maps, fitted = torch.empty(learned.shape), torch.from_numpy(learned & kept[:, None])
    for rows, chunk in images.chunks():
        maps[rows] = density.score(chunk, images.positions, fitted[rows])
    return maps


def image_scores(patches: torch.Tensor, tail: float) -> np.ndarray:
    """See `image_score`, ``[N]``."""
    return image_score(patches, tail).double().numpy()


def _beginning(
    store: FeatureStore,
    grid: tuple[int, int],
    settings: Settings,
    seed: int,
    progress: Progress,
    start: tuple[Whitening, PatchFlow, Parameters] | None,
    log: Callable[[dict[str, float], int], None],
) -> tuple[Images, PatchFlow, Parameters]:
    if start is not None:
        whitening, flow, initial = start
        return Images(store, whitening, grid), flow, initial
    flow = new_flow(store.shape[1], settings.dimensions, settings.blocks, settings.hidden, seed_for(seed, "flow"))
    images = Images(store, fit_whitening([store], flow.dimensions, seed), grid)
    return images, flow, learn_initialisation([images], flow, settings, seed, progress, log)


def _compare(
    images: Images, settings: Settings, seed: int, progress: Progress
) -> tuple[NearestImages | None, Structure]:
    """The images compared with each other, unless nothing is rejected anyway."""
    count = len(images.store)
    if settings.rounds == 0:
        return None, Structure("aligned", float("nan"), float("nan"), np.zeros(count, dtype=int))
    task = progress.add_task("comparing images", total=count)
    neighbours = NearestImages(
        images.store,
        images.grid,
        seed_for(seed, "references"),
        settings.neighbour_window,
        settings.references,
        on_images=lambda done: progress.update(task, advance=done),
    )
    structure = find_structure(neighbours, settings.neighbour_tail, seed_for(seed, "structure"), settings.structure)
    return neighbours, structure


def _with_likeness(
    scores: np.ndarray,
    unusual: np.ndarray,
    kept: np.ndarray,
    structure: Structure,
    settings: Settings,
    answers: Mapping[int, bool] | None,
) -> Scales:
    """Scores with as much of the likeness as it is trusted, and the likeness itself."""
    if settings.likeness_weight == 0 or len(scores) < FEWEST_IMAGES:
        return Scales(scores, None, structure.comparable)
    alike, trust = likeness(unusual, scores, answers)
    alike = standardised(alike, kept, structure.variants)
    total = standardised(scores + settings.likeness_weight * trust * alike, kept, structure.variants)
    return Scales(total, alike, structure.comparable)


def _none_rejected(kept: np.ndarray, answers: Mapping[int, bool] | None) -> bool:
    """Whether the rule rejected no image; what a person rejects does not count as standing apart."""
    return all(kept[i] for i in range(len(kept)) if i not in (answers or {}))


def _without_unusual(
    images: Images, kept: np.ndarray, neighbours: NearestImages, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Masks ``[N x P]`` of the patches to learn from, and of the usual ones, where no image stands apart as a whole.

    Where images do, the rest of the unusual patches are mostly good ones. All are learned from if images would change
    their order without the unusual ones.
    """
    everyone = np.ones((len(kept), len(images.positions)), dtype=bool)
    usual = everyone.copy()
    usual[kept] = usual_patches(neighbours.episodic(kept)[0][kept].numpy(), settings.patch_fence)
    learned = outside_regions(usual, images.grid, LEAST_REGION)
    before, after = (_gaussian_scores(images, kept, mask, settings) for mask in (everyone, learned))
    return (learned, usual) if keeps_order(before, after) else (everyone, everyone)


def _gaussian_scores(images: Images, kept: np.ndarray, learned: np.ndarray, settings: Settings) -> np.ndarray:
    """Scores of the kept images by the Gaussians alone, ``[n]``: what the flow adds is far smaller."""
    gaussian = fit_gaussian(images, kept, learned, settings.shrinkage)
    scores = []
    for rows, chunk in images.chunks(np.flatnonzero(kept)):
        z, log_det = held_out(chunk, gaussian, torch.from_numpy(learned[rows]))
        scores.append(image_score(bits_per_dimension(z, log_det), settings.tail))
    return torch.cat(scores).numpy()


def _category(images: Images, settings: Settings, seed: int) -> Category:
    """All images as episodes are drawn from them."""
    kept = np.ones(len(images.store), dtype=bool)
    learned = np.ones((len(kept), len(images.positions)), dtype=bool)
    gaussian = fit_gaussian(images, kept, learned, settings.shrinkage)
    rows = _pool_rows(kept, torch.Generator().manual_seed(seed_for(seed, "pool")))
    return Category(_pool(images, rows, gaussian), images.positions)


def _pool_rows(kept: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Up to ``_POOL`` of the kept images, in order."""
    rows = np.flatnonzero(kept)
    if len(rows) <= _POOL:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:_POOL].sort().values.numpy()]


def _pool(images: Images, rows: np.ndarray, gaussian: PositionalGaussian) -> torch.Tensor:
    """Whitened patches ``[n x P x D]`` of some images, as held-out images would look."""
    return torch.cat([gaussian.leave_one_out(gaussian(chunk))[0] for _, chunk in images.chunks(rows)])
