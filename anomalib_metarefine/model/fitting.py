"""From the feature store to a density of clean patches and a decision about every image: the stages in order.

This is where the stages meet. Each of them is a function or a small class of its own module; here they are put in
order and told which images to look at. Memory stays bounded: images are whitened chunk by chunk, and gradient steps
draw their patches from a pool of limited size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.func import functional_call

from anomalib_metarefine.curation.refine import Refinement, Round, refine
from anomalib_metarefine.curation.rules import get_rule
from anomalib_metarefine.curation.scores import hybrid
from anomalib_metarefine.density.flow import PatchFlow, bits_per_dimension, image_score, position_code
from anomalib_metarefine.features.embedding import PositionalGaussian, Whitening
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.meta.episodes import PatchBatch, draw_batch, draw_episode
from anomalib_metarefine.meta.maml import Parameters, adapt, meta_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from anomalib_metarefine.features.store import FeatureStore

_CHUNK = 64  # images whitened at a time
_POOL = 384  # images that gradient steps draw from
_NEIGHBOUR_TAIL = 0.02  # share of the patches; between what ELPV (0.03) and `screw` (0.01) like best
_WHITENING_PATCHES = 65_536  # enough for 150 channels; more change no digit that matters


@dataclass(frozen=True)
class FitSettings:
    """Settings of meta-training and refinement; `MetaRefine` documents each, and has the same defaults."""

    dimensions: int = 128
    blocks: int = 4
    hidden: int = 64
    shrinkage: float = 0.2
    tail: float = 0.03
    trim: float = 0.1
    meta_steps: int = 10
    episodes: int = 2
    support_images: int = 16
    inner_steps: int = 2
    inner_lr: float = 0.1
    meta_lr: float = 5e-4
    first_order: bool = False
    adaptation_steps: int = 10
    batch_patches: int = 1024
    likelihood_weight: float = 0.0
    neighbour_weight: float = 1.0
    rule: str = "auto"
    rounds: int = 4


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
        log (Callable[[dict[str, float], int], None]): Receives figures and their step.
    """

    def __init__(
        self,
        store: FeatureStore,
        flow: PatchFlow,
        grid: tuple[int, int],
        settings: FitSettings,
        generator: torch.Generator,
        progress: Progress,
        log: Callable[[dict[str, float], int], None],
    ) -> None:
        self.store, self.flow, self.settings = store, flow, settings
        self.generator, self.progress, self.log = generator, progress, log
        self.positions = position_code(*grid)
        self.grid = grid
        # Sorted by path, so that results of several runs list the images alike, however the dataloader shuffled.
        self.order = np.argsort(store.paths, kind="stable")
        self.whitening = Whitening.fit(store.sample_patches(_WHITENING_PATCHES, generator), flow.dimensions)

    def fit(self, known: Mapping[int, bool] | None = None) -> tuple[Density, Refinement]:
        """Meta-train, then refine.

        Args:
            known (Mapping[int, bool] | None): Images, by their place in the sorted list, that a person has decided on.

        Returns:
            tuple[Density, Refinement]: The density fitted on the kept images, and what was decided about each image.
        """
        initial = self.meta_train()
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
            return scores

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
        refinement = refine(score, paths, get_rule(self.settings.rule), self.settings.rounds, report, known)
        if "likelihood" not in weights:
            self.density = self.fit_kept(self.kept, initial)
            self.parts["likelihood"] = self.likelihood_scores()
        refinement.left_out = dict(self.store.left_out)
        refinement.parts = {name: values.tolist() for name, values in self.parts.items()}
        self.progress.update(task, completed=self.settings.rounds + 1)
        return self.density, refinement

    def meta_train(self) -> Parameters:
        """MAML over episodes drawn from all training images, dirty ones included.

        Returns:
            Parameters: The meta-learned initialisation of the flow.
        """
        settings = self.settings
        everything = np.ones(len(self.store), dtype=bool)
        pool = self._pool(everything, self.fit_gaussian(everything))
        parameters = trainable(self.flow)
        optimizer = torch.optim.Adam(parameters.values(), lr=settings.meta_lr)
        task = self.progress.add_task("meta-training", total=settings.meta_steps)
        for step in range(settings.meta_steps):
            episodes = [
                draw_episode(
                    pool,
                    self.positions,
                    settings.support_images,
                    settings.inner_steps,
                    settings.batch_patches,
                    self.generator,
                )
                for _ in range(settings.episodes)
            ]
            gradients, query = meta_gradient(self._loss, parameters, episodes, settings.inner_lr, settings.first_order)
            for name, value in parameters.items():
                value.grad = gradients[name]
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            self.progress.update(task, advance=1, description=f"meta-training, query {query:.3f} bits/dim")
            self.log({"meta/query_bits_per_dim": query}, step)
        return {name: value.detach().requires_grad_() for name, value in parameters.items()}

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
        """Positional whitening of the kept images (``[N]`` mask)."""
        return PositionalGaussian.fit(
            (chunk for _, chunk in self.whitened(np.flatnonzero(kept))), self.settings.shrinkage
        )

    def fit_kept(self, kept: np.ndarray, initial: Parameters) -> Density:
        """Positional whitening from scratch and the flow from ``initial``: a rejected image leaves no trace."""
        settings = self.settings
        gaussian = self.fit_gaussian(kept)
        pool = self._pool(kept, gaussian)
        everyone = torch.arange(len(pool))
        batches = (
            draw_batch(pool, self.positions, everyone, settings.batch_patches, self.generator)
            for _ in range(settings.adaptation_steps)
        )
        return Density(self.whitening, gaussian, adapt(self._loss, initial, batches, settings.inner_lr))

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
            z, log_det = self._held_out(chunk, density.gaussian, torch.from_numpy(kept[rows]))
            output, flow_log_det = functional_call(
                self.flow, density.parameters, (z.flatten(0, 1), self.positions.repeat(len(rows), 1))
            )
            maps[rows] = bits_per_dimension(output, flow_log_det + log_det.flatten()).view(len(rows), -1)
        return maps

    def _loss(self, parameters: Parameters, batch: PatchBatch) -> torch.Tensor:
        """Trimmed mean of the patch scores: the least likely patches of a dirty set must not be learned."""
        z, log_det = functional_call(self.flow, parameters, tuple(batch))
        bits = bits_per_dimension(z, log_det)
        trusted = max(1, round((1 - self.settings.trim) * len(bits)))
        return bits.topk(trusted, largest=False, sorted=False).values.mean()

    def whitened(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Chunks of image numbers and their globally whitened patches ``[n x P x D]``."""
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            yield part, self.whitening(self.store.images(self.order[part]))

    def _pool(self, kept: np.ndarray, gaussian: PositionalGaussian) -> torch.Tensor:
        """Whitened patches ``[n x P x D]`` of up to ``_POOL`` kept images, as held-out images would look."""
        rows = np.flatnonzero(kept)
        if len(rows) > _POOL:
            picks = torch.randperm(len(rows), generator=self.generator)[:_POOL].sort().values.numpy()
            rows = rows[picks]
        return torch.cat([gaussian.leave_one_out(gaussian(chunk))[0] for _, chunk in self.whitened(rows)])

    @staticmethod
    def _held_out(
        chunk: torch.Tensor, gaussian: PositionalGaussian, fitted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positional whitening, with the leave-one-out correction for the images that were ``fitted`` on."""
        z = gaussian(chunk)
        held_out, log_det = gaussian.leave_one_out(z)
        mask = fitted.view(-1, 1)
        return torch.where(mask.unsqueeze(-1), held_out, z), torch.where(mask, log_det, gaussian.log_det)


def trainable(flow: PatchFlow) -> Parameters:
    """Detached copies of the parameters that learn; the frozen permutations of the couplings stay out."""
    return {
        name: value.detach().clone().requires_grad_() for name, value in flow.named_parameters() if value.requires_grad
    }


def progress_bars(enabled: bool) -> Progress:
    """Bars with counts and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not enabled)
