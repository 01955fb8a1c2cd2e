"""From the feature store to a density of clean patches and a decision about every image: the stages in order.

This is where the stages meet. Each of them is a function or a small class of its own module; here they are put in
order and told which images to look at. Memory stays bounded: images are whitened chunk by chunk, and gradient steps
draw their patches from a pool of limited size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from rich.progress import Progress
from torch.func import functional_call

from anomalib_metarefine.density.flow import PatchFlow, bits_per_dimension, image_score, position_code
from anomalib_metarefine.density.gaussian import PositionalGaussian
from anomalib_metarefine.features.embedding import Whitening
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.meta.episodes import Category, PatchBatch, draw_patches
from anomalib_metarefine.meta.maml import Parameters, get_learner
from anomalib_metarefine.meta.training import MetaSettings, meta_train
from anomalib_metarefine.refinement.likeness import FEWEST_IMAGES, deviations, likeness, reordered, resemblance
from anomalib_metarefine.refinement.patches import LEAST_REGION, keeps_order, outside_regions, usual_patches
from anomalib_metarefine.refinement.posterior import further_scales
from anomalib_metarefine.refinement.rounds import Refinement, Round, refine
from anomalib_metarefine.refinement.rules import PosteriorFence, get_rule
from anomalib_metarefine.refinement.scores import hybrid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from anomalib_metarefine.features.store import FeatureStore
    from anomalib_metarefine.meta.maml import Loss

Log: TypeAlias = "Callable[[dict[str, float], int], None]"

_CHUNK = 64  # images whitened at a time
_POOL = 384  # images that gradient steps draw from
_RESEMBLANCE = 2  # its weight, in those of likeness: its teachers are certain
_NEIGHBOUR_TAIL = 0.02  # share of the patches; between what ELPV (0.03) and `screw` (0.01) like best
_WHITENING_PATCHES = 65_536  # enough for 150 channels; more change no digit that matters


@dataclass(frozen=True)
class FitSettings(MetaSettings):
    """Settings of meta-training and refinement; `MetaRefine` documents each, and has the same defaults."""

    dimensions: int = 128
    blocks: int = 4
    hidden: int = 64
    shrinkage: float = 0.2
    tail: float = 0.03
    trim: float = 0.1
    adaptation_steps: int = 10
    likelihood_weight: float = 0.0
    neighbour_weight: float = 1.0
    likeness_weight: float = 0.25
    rule: str = "auto"
    rounds: int = 4
    patch_fence: float = 2.5


def _ignore(_figures: dict[str, float], _step: int) -> None:
    return


class Density(NamedTuple):
    """A fitted density of patches: global whitening, positional whitening, flow parameters."""

    whitening: Whitening
    gaussian: PositionalGaussian
    parameters: Parameters


class DensityFitter:
    """Fits a `Density` on the images of a store that refinement keeps.

    Args:
        store (FeatureStore): Embeddings of all training images.
        flow (PatchFlow): The flow; its parameters are read as the starting point of meta-training and left as they are.
        grid (tuple[int, int]): Rows and columns of patches.
        settings (FitSettings): See `MetaRefine`.
        generator (torch.Generator): Source of all randomness.
        progress (Progress): Where bars are shown.
        log (Log): Receives figures and their step.
        whitening (Whitening | None): Global whitening; ``None`` fits it on the store.
        initial (Parameters | None): A meta-learned initialisation; ``None`` learns one on the store. It knows
            patches by its own global whitening, so the two belong together.
    """

    def __init__(
        self,
        store: FeatureStore,
        flow: PatchFlow,
        grid: tuple[int, int],
        settings: FitSettings,
        generator: torch.Generator,
        progress: Progress,
        log: Log = _ignore,
        whitening: Whitening | None = None,
        initial: Parameters | None = None,
    ) -> None:
        self.store, self.flow, self.settings = store, flow, settings
        self.generator, self.progress, self.log = generator, progress, log
        self.positions = position_code(*grid)
        self.grid = grid
        # Sorted by path, so that results of several runs list the images alike, however the dataloader shuffled.
        self.order = np.argsort(store.paths, kind="stable")
        self.initial = initial
        self.whitening = whitening or Whitening.fit(
            store.sample_patches(_WHITENING_PATCHES, generator), flow.dimensions
        )
        self.loss = flow_loss(flow, settings.trim)
        self.usual = np.ones((len(store), len(self.positions)), dtype=bool)  # patches
        self.learned = torch.from_numpy(self.usual.copy())

    def fit(self, known: Mapping[int, bool] | None = None) -> tuple[Density, Refinement]:
        """Meta-train, then refine.

        Args:
            known (Mapping[int, bool] | None): Images, by their place in the sorted list, that a person has decided on.

        Returns:
            tuple[Density, Refinement]: The density fitted on the kept images, and what was decided about each image.
        """
        initial = self.initial or self.meta_train()
        weights = self._weights()
        self.neighbours = self._find_neighbours() if "neighbours" in weights else None
        task = self.progress.add_task("refinement", total=self.settings.rounds + 1)

        def score(kept: np.ndarray) -> np.ndarray:
            self.kept = kept
            if "likelihood" in weights:
                self.density = self.fit_kept(kept, initial)
            ways = {"likelihood": self.likelihood_scores, "neighbours": self.neighbour_scores}
            self.parts = {name: ways[name]() for name in weights}
            scores, self.units = hybrid(self.parts, weights, kept)
            return self._by_likeness(scores, known)

        def report(number: int, outcome: Round) -> None:
            share = outcome.rejected / len(outcome.scores)
            self.progress.update(
                task, advance=1, description=f"refinement, round {number}: {outcome.rejected} rejected ({share:.1%})"
            )
            figures = {"rejected": float(outcome.rejected), "median_score": float(np.median(outcome.scores))}
            if np.isfinite(outcome.fence):
                figures["fence"] = outcome.fence
            self.log({f"refine/{key}": value for key, value in figures.items()}, number)

        paths = [self.store.paths[i] for i in self.order]
        rule = get_rule(self.settings.rule)

        def fence(scores: np.ndarray) -> float:
            if isinstance(rule, PosteriorFence):
                return rule.fence(scores, known, further_scales(self.parts))
            return rule.fence(scores)

        refinement = refine(score, paths, fence, self.settings.rounds, report, known)
        if self.neighbours is not None:
            self._leave_out_patches(known)
            self.density = self.fit_kept(self.kept, initial)
            self.parts["likelihood"] = self.likelihood_scores()
        refinement.unusual_patches = 1 - self.learned[self.kept].float().mean().item()
        refinement.left_out = dict(self.store.left_out)
        refinement.parts = {name: values.tolist() for name, values in self.parts.items()}
        self.progress.update(task, completed=self.settings.rounds + 1)
        return self.density, refinement

    def meta_train(self) -> Parameters:
        """Learn the flow's initialisation on episodes drawn from all training images, dirty ones included."""
        return learn_initialisation(
            [self.category()], trainable(self.flow), self.loss, self.settings, self.generator, self.progress, self.log
        )

    def category(self, kept: np.ndarray | None = None) -> Category:
        """The training images, or those of a mask ``[N]``, whitened, as episodes are drawn from them."""
        kept = np.ones(len(self.store), dtype=bool) if kept is None else kept
        gaussian = self.fit_gaussian(kept)
        return Category(self._pool(self._pool_rows(kept), gaussian), self.positions)

    def _find_neighbours(self) -> NearestImages:
        task = self.progress.add_task("comparing images", total=len(self.store))
        return NearestImages(
            self.store,
            self.order,
            self.grid,
            self.generator,
            on_images=lambda count: self.progress.update(task, advance=count),
        )

    def fit_gaussian(self, kept: np.ndarray) -> PositionalGaussian:
        """Positional whitening of the kept images (``[N]`` mask), less their rejected patches."""
        chunks = (chunk for _, chunk in self.whitened(np.flatnonzero(kept)))
        return PositionalGaussian.fit(chunks, self.settings.shrinkage, self.learned[kept])

    def fit_kept(self, kept: np.ndarray, initial: Parameters) -> Density:
        """Positional whitening from scratch and the flow from ``initial``: what is rejected leaves no trace."""
        settings = self.settings
        gaussian = self.fit_gaussian(kept)
        rows = self._pool_rows(kept)
        pool, usable = self._pool(rows, gaussian), self.learned[rows].nonzero()
        batches = (
            draw_patches(pool, self.positions, usable, settings.batch_patches, self.generator)
            for _ in range(settings.adaptation_steps)
        )
        parameters = get_learner(settings.meta_backend).adapt(self.loss, initial, batches, settings.inner_lr)
        return Density(self.whitening, gaussian, parameters)

    def _leave_out_patches(self, known: Mapping[int, bool] | None) -> None:
        """Reject regions of images where no whole image stands apart, if images keep their order without them.

        Where images do, the rest of the unusual patches are mostly good ones: on ELPV mono it costs half a point then.
        """
        decided_by_rule = np.ones(len(self.kept), dtype=bool)
        decided_by_rule[list(known or {})] = False
        if self.settings.patch_fence == 0 or not self.kept[decided_by_rule].all():
            return
        before = self._gaussian_scores()
        distances = self.episodes[0][self.kept].numpy()
        self.usual[self.kept] = usual_patches(distances, self.settings.patch_fence)
        self.learned = torch.from_numpy(outside_regions(self.usual, self.grid, LEAST_REGION))
        if not keeps_order(before, self._gaussian_scores()):
            self.usual[:] = True
            self.learned[:] = True

    def _gaussian_scores(self) -> np.ndarray:
        """Scores of the kept images by the positional Gaussian alone, ``[n]``: what the flow adds is far smaller."""
        gaussian = self.fit_gaussian(self.kept)
        scores = []
        for rows, chunk in self.whitened(np.flatnonzero(self.kept)):
            z, log_det = self._held_out(chunk, gaussian, self.learned[rows])
            scores.append(image_score(bits_per_dimension(z, log_det), self.settings.tail))
        return torch.cat(scores).numpy()

    def _weights(self) -> dict[str, float]:
        """Weights of the parts of the score that refinement rejects by."""
        if self.settings.rounds == 0:  # nothing is rejected, so there is nothing to compare images with each other for
            return {"likelihood": 1.0}
        weights = {"likelihood": self.settings.likelihood_weight, "neighbours": self.settings.neighbour_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def likelihood_scores(self) -> np.ndarray:
        """Bits per dimension of the least likely patches under the density of the kept images, ``[N]``."""
        self.maps = self.anomaly_maps()
        return image_score(self.maps, self.settings.tail).double().numpy()

    def neighbour_scores(self) -> np.ndarray:
        """Mean distance of the most distant patches to their like in support sets of kept images, ``[N]``."""
        self.episodes = self.neighbours.episodic(self.kept)
        return image_score(self.episodes[0], _NEIGHBOUR_TAIL).double().numpy()

    def _by_likeness(self, scores: np.ndarray, known: Mapping[int, bool] | None) -> np.ndarray:
        """The scores ``[N]`` in an order that says, too, what images are unusual in the same way as suspicious ones.

        That order comes from score and likeness added up. They are a second scale, ``self.parts["combined"]``, where
        likeness explains at least half: with less (`screw`) it would be the first one and noise, and a second chance
        for a fence to err. Once images are rejected, how much an image resembles them makes a third,
        ``self.parts["resembling"]``, and the order of all three: a fence counts the images past it on one scale, and
        rejects as many by the order.
        """
        weight = self.settings.likeness_weight
        if weight == 0 or self.neighbours is None or len(scores) < FEWEST_IMAGES:
            return scores
        unusual = deviations(self.whitened(np.arange(len(scores))), self.episodes[0], self.kept)
        self.parts["likeness"], trust = likeness(unusual, scores, known)
        order = combined = self._sum(scores, self.parts["likeness"], weight * trust)
        if trust == 1:
            alike = resemblance(unusual, combined, self.kept, known)
            if alike is not None:
                self.parts["resemblance"] = alike
                order = self.parts["resembling"] = self._sum(scores, alike, _RESEMBLANCE * weight)
            self.parts["combined"] = reordered(combined, order)
        return reordered(scores, order)

    def _sum(self, scores: np.ndarray, other: np.ndarray, weight: float) -> np.ndarray:
        """Scores and ``weight`` times something else, each in its spreads over the kept images, ``[N]``."""
        return hybrid({"score": scores, "other": other}, {"score": 1.0, "other": weight}, self.kept)[0]

    def uncertainty(self) -> np.ndarray:
        """Standard deviation of the final scores over support sets, ``[N]``; zero where images were not compared."""
        if self.neighbours is None:
            return np.zeros(len(self.kept))
        mean, deviation = self.episodes
        highest = mean.topk(max(1, round(_NEIGHBOUR_TAIL * mean.shape[1])), dim=1).indices
        return deviation.gather(1, highest).mean(1).double().numpy() * self.units["neighbours"]

    @torch.no_grad()
    def anomaly_maps(self) -> torch.Tensor:
        """Patch scores of all images; those the density was fitted on as if left out of its whitening.

        Returns:
            torch.Tensor: ``[N x P]``, bits per dimension.
        """
        kept, density = self.kept, self.density
        maps = torch.empty(len(kept), len(self.positions))
        for rows, chunk in self.whitened(np.arange(len(kept))):
            fitted = self.learned[rows] & torch.from_numpy(kept[rows]).unsqueeze(1)
            z, log_det = self._held_out(chunk, density.gaussian, fitted)
            output, flow_log_det = functional_call(
                self.flow, density.parameters, (z.flatten(0, 1), self.positions.repeat(len(rows), 1))
            )
            maps[rows] = bits_per_dimension(output, flow_log_det + log_det.flatten()).view(len(rows), -1)
        return maps

    def whitened(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Chunks of image numbers and their globally whitened patches ``[n x P x D]``."""
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            yield part, self.whitening(self.store.images(self.order[part]))

    def _pool_rows(self, kept: np.ndarray) -> np.ndarray:
        """Up to ``_POOL`` of the kept images, in order."""
        rows = np.flatnonzero(kept)
        if len(rows) <= _POOL:
            return rows
        return rows[torch.randperm(len(rows), generator=self.generator)[:_POOL].sort().values.numpy()]

    def _pool(self, rows: np.ndarray, gaussian: PositionalGaussian) -> torch.Tensor:
        """Whitened patches ``[n x P x D]`` of some images, as held-out images would look."""
        return torch.cat([gaussian.leave_one_out(gaussian(chunk))[0] for _, chunk in self.whitened(rows)])

    @staticmethod
    def _held_out(
        chunk: torch.Tensor, gaussian: PositionalGaussian, fitted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positional whitening, with the leave-one-out correction for the patches ``[n x P]`` that were fitted on."""
        z = gaussian(chunk)
        held_out, log_det = gaussian.leave_one_out(z)
        return torch.where(fitted.unsqueeze(-1), held_out, z), torch.where(fitted, log_det, gaussian.log_det)


def new_flow(channels: int, settings: FitSettings, seed: int) -> PatchFlow:
    """An untrained flow for embeddings of so many channels; the same seed gives the same permutations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchFlow(min(settings.dimensions, channels), settings.blocks, settings.hidden)


def learn_initialisation(
    categories: Sequence[Category],
    start: Parameters,
    loss: Loss,
    settings: MetaSettings,
    generator: torch.Generator,
    progress: Progress,
    log: Log = _ignore,
) -> Parameters:
    """`meta_train` with a bar and a log; arguments as there and in `DensityFitter`."""
    task = progress.add_task("meta-training", total=settings.meta_steps)

    def on_step(step: int, query_loss: float) -> None:
        progress.update(task, advance=1, description=f"meta-training, query {query_loss:.3f} bits/dim")
        log({"meta/query_bits_per_dim": query_loss}, step)

    return meta_train(categories, start, loss, settings, generator, on_step)


def trainable(flow: PatchFlow) -> Parameters:
    """Detached copies of the parameters that learn; the frozen permutations of the couplings stay out."""
    return {
        name: value.detach().clone().requires_grad_() for name, value in flow.named_parameters() if value.requires_grad
    }


def flow_loss(flow: PatchFlow, trim: float) -> Loss:
    """Loss of the flow's parameters on a `PatchBatch`: trimmed mean of the patch scores, in bits per dimension.

    The least likely patches of a dirty set must not be learned.

    Args:
        flow (PatchFlow): The architecture.
        trim (float): Share of the least likely patches that are not learned from.

    Returns:
        Loss: A scalar function of parameters and batch.
    """

    def loss(parameters: Parameters, batch: PatchBatch) -> torch.Tensor:
        bits = bits_per_dimension(*functional_call(flow, parameters, (batch.patches, batch.positions)))
        trusted = max(1, round((1 - trim) * len(bits)))
        return bits.topk(trusted, largest=False, sorted=False).values.mean()

    return loss
