"""What does the initialisation of the flow buy? Every way to get one, with and without refinement, on dirty folders.

    python -m studies.ablation --out ablation.csv --data elpv-mono elpv-poly parts/screw:150

Features of a data set are computed once, and the images that neighbours reject once for each training set; what is
left, meta-training and fitting, is what the rows differ in.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.density.flow import position_code
from anomalib_metarefine.density.scorer import PatchScorer
from anomalib_metarefine.features.embedding import image_score
from anomalib_metarefine.model.initialisation import learn_together
from anomalib_metarefine.refinement.fitting import Images, fit_density, learn_initialisation
from anomalib_metarefine.settings import Settings
from studies.common import add_grid, all_features, begin, dirty_set, finished, markdown, record, refine, spread
from studies.data_sets import parse_data_set

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from anomalib_metarefine.data.contamination import Contaminated
    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.density.patch_density import PatchDensity
    from anomalib_metarefine.features.embedding import Whitening
    from anomalib_metarefine.features.store import FeatureStore
    from anomalib_metarefine.meta.maml import Parameters

KEY = ["data", "train_images", "contamination", "seed", "start", "refinement"]
_TRAINED = {"meta_steps": 50, "meta_lr": 2e-3}
STARTS: dict[str, dict[str, Any]] = {
    "random": {"meta_steps": 0},
    "MAML, 10 small steps": {"meta_steps": 10, "meta_lr": 5e-4},
    "pre-training": {"meta_algorithm": "pretraining", **_TRAINED},
    "FOMAML": {"meta_algorithm": "fomaml", **_TRAINED},
    "MAML": _TRAINED,
    "MAML over other data sets": _TRAINED,  # not possible with one data set
    "full training on what is kept": {"meta_algorithm": "pretraining", **_TRAINED},
}
OTHERS = "MAML over other data sets"
_FULL = "full training on what is kept"
REFINEMENTS: dict[str, dict[str, Any]] = {
    "none": {"rounds": 0},
    "neighbours": {"likelihood_weight": 0.0, "likeness_weight": 0.0},
    "likelihood": {
        "likelihood_weight": 1.0,
        "neighbour_weight": 0.0,
        "likeness_weight": 0.0,
        "rule": "iqr",
    },
}
_CHUNK = 64  # test images at a time


class Features(NamedTuple):
    """All images of a data set.

    Attributes:
        store (FeatureStore): Embeddings.
        grid (tuple[int, int]): Rows and columns of patches.
        seconds (float): What the backbone took for an image.
    """

    store: FeatureStore
    grid: tuple[int, int]
    seconds: float


def run(
    out: Path,
    data: Sequence[DataSet],
    train_images: Sequence[int | None],
    contaminations: Sequence[float],
    seeds: Sequence[int],
    starts: Sequence[str],
    refinements: Sequence[str],
) -> Iterator[dict[str, Any] | str]:
    """Fit and test every cell that is not in the result file yet.

    Args:
        out (Path): CSV that rows are added to.
        data (Sequence[DataSet]): Data sets; an initialisation "over other data sets" is learned on the others of these.
        train_images (Sequence[int | None]): Sizes of the training set; ``None`` is the data set's own.
        contaminations (Sequence[float]): Shares of dirty training images, in [0, 1).
        seeds (Sequence[int]): Which images are drawn, and everything random.
        starts (Sequence[str]): Keys of `STARTS`.
        refinements (Sequence[str]): Keys of `REFINEMENTS`.

    Yields:
        dict[str, Any] | str: A row: `KEY`, image AUROC, bits per dimension of normal test patches, images rejected with
            precision and recall, seconds of meta-training, of everything after it, and of the backbone for these
            training images; or why a training set can't be had.
    """
    done = finished(out, KEY)
    features: dict[str, Features] = {}
    for seed, data_set, size, contamination in itertools.product(seeds, data, train_images, contaminations):
        images = size or data_set.train_images
        where = (data_set.name, images, contamination, seed)
        wanted = [pair for pair in itertools.product(starts, refinements) if (*where, *pair) not in done]
        if not wanted:
            continue
        try:
            training = _Training(data_set, data, features, images, contamination, seed)
        except ValueError as error:
            yield f"{data_set.name}, {images} images, {contamination:.0%}, seed {seed} left out: {error}"
            continue
        for start, refinement in wanted:
            yield dict(zip(KEY, (*where, start, refinement), strict=True)) | training.measure(start, refinement)


class _Training:
    """One training set, and what its rows share."""

    def __init__(
        self,
        data_set: DataSet,
        all_data: Sequence[DataSet],
        features: dict[str, Features],
        images: int | None,
        contamination: float,
        seed: int,
    ) -> None:
        self.seed, self.contamination, self.known = seed, contamination, features
        self.others = [other for other in all_data if other.name != data_set.name]
        self.store, self.grid, datamodule = self._load(data_set, images, contamination)
        self.dirty = set(datamodule.injected)
        samples = datamodule.test_data.samples
        self.test = features[data_set.name].store.of(samples.image_path.astype(str).tolist()).images()
        self.labels = samples.label_index.to_numpy()
        self.backbone_seconds = features[data_set.name].seconds * len(self.store)
        self.learned: dict[str, tuple[Whitening, PatchFlow, Parameters, float]] = {}

    def measure(self, start: str, refinement: str) -> dict[str, Any]:
        """One row."""
        *initial, meta_seconds = self.initialisation(start)
        begin = time.perf_counter()
        found = refine((self.store, self.grid), self.seed, tuple(initial), **REFINEMENTS[refinement])
        density = self.fully_trained(found.images, found.kept) if start == _FULL else found.density
        seconds = time.perf_counter() - begin
        rejected, dirty = ~found.kept, np.isin(self.store.paths, list(self.dirty))
        scores, bits = self.score(density)
        return {
            "image_AUROC": roc_auc_score(self.labels, scores),
            "normal_bits": bits,
            "rejected": int(rejected.sum()),
            "precision": dirty[rejected].mean() if rejected.any() else float("nan"),
            "recall": rejected[dirty].mean() if dirty.any() else float("nan"),
            "meta_seconds": meta_seconds,
            "fit_seconds": seconds,
            "backbone_seconds": self.backbone_seconds,
        }

    def initialisation(self, start: str) -> tuple[Whitening, PatchFlow, Parameters, float]:
        """Global whitening, flow, its initialisation, and the seconds it took."""
        if start not in self.learned:
            settings = Settings(**(STARTS["random"] if start == _FULL else STARTS[start]))
            others = (
                [self._load(other, None, self.contamination)[:2] for other in self.others] if start == OTHERS else []
            )
            began = time.perf_counter()
            if others:
                learned = learn_together(others, settings, self.seed, Progress(disable=True))
            else:
                images, flow, initial = begin((self.store, self.grid), self.seed, settings)
                learned = images.whitening, flow, initial
            self.learned[start] = (*learned, time.perf_counter() - began)
        return self.learned[start]

    def fully_trained(self, images: Images, kept: np.ndarray) -> PatchDensity:
        """The flow trained on the kept images from its random start, as long as the others are meta-trained."""
        settings = Settings(adaptation_steps=0, **STARTS[_FULL])
        whitening, flow, *_ = self.initialisation(_FULL)
        part = Images(self.store.of([self.store.paths[i] for i in np.flatnonzero(kept)]), whitening, self.grid)
        trained = learn_initialisation([part], flow, settings, self.seed, Progress(disable=True))
        return fit_density(images, kept, None, flow, trained, settings, self.seed)

    @torch.no_grad()
    def score(self, density: PatchDensity) -> tuple[np.ndarray, float]:
        """Image scores of the test set, and the mean bits per dimension of the patches of its normal images."""
        flow, scorer = copy.deepcopy(density.flow), PatchScorer()
        flow.load_state_dict({name: value.detach() for name, value in density.parameters.items()}, strict=False)
        scorer.load(density, flow, position_code(*self.grid))
        maps = torch.cat([scorer(chunk) for chunk in self.test.split(_CHUNK)])
        return image_score(maps, Settings().tail).numpy(), maps[self.labels == 0].mean().item()

    def _load(
        self, data_set: DataSet, images: int | None, contamination: float
    ) -> tuple[FeatureStore, tuple[int, int], Contaminated]:
        datamodule = dirty_set(data_set, contamination, self.seed, images)
        if data_set.name not in self.known:
            begin = time.perf_counter()
            store, grid = all_features(datamodule, data_set)
            self.known[data_set.name] = Features(store, grid, (time.perf_counter() - begin) / len(store))
        whole = self.known[data_set.name]
        paths = datamodule.train_data.samples.image_path.astype(str)
        return whole.store.of(sorted(paths)), whole.grid, datamodule


def summarise(rows: pd.DataFrame) -> str:
    """Markdown tables: image AUROC by start, one table for each refinement; and what each start costs.

    Args:
        rows (pd.DataFrame): Of `run`.

    Returns:
        str: Means over seeds ± standard deviations, in per cent; averages count every data set the same, and only cells
            (data set, size, contamination, seed) that all starts of the table have.
    """
    parts = []
    starts = [start for start in STARTS if start in set(rows.start)]
    for refinement in (name for name in REFINEMENTS if name in set(rows.refinement)):
        wide = rows[rows.refinement == refinement].pivot_table("image_AUROC", KEY[:4], "start")
        wide = 100 * wide[[start for start in starts if start in wide]]
        lines = [
            [name, f"{images:g}", f"{share:.0%}", *(spread(group[start], 1) for start in wide)]
            for (name, images, share), group in wide.groupby(level=KEY[:3], sort=False)
        ]
        whole = wide.dropna().groupby(level=["data", "contamination", "train_images"]).mean()
        few = whole.index.get_level_values("train_images").nunique() > whole.index.get_level_values("data").nunique()
        for value, group in whole.groupby(level="train_images" if few else "contamination"):
            label = ["average", f"{value:g}", ""] if few else ["average", "", f"{value:.0%}"]
            lines.append([*label, *(f"{mean:.1f}" for mean in group.mean())])
        parts += [f"### Refinement: {refinement}", markdown(["data", "images", "dirty", *wide.columns], lines)]
    cost = rows[rows.refinement == "none"].assign(ratio=lambda r: r.meta_seconds / r.backbone_seconds)
    costs = [[start, f"{cost[cost.start == start].ratio.median():.2f}"] for start in starts]
    parts += ["### Time of meta-training in passes of the backbone, median", markdown(["start", "passes"], costs)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser, [0, 0.2, 0.4])
    add = parser.add_argument
    add("--train-images", type=int, nargs="+", default=[None], metavar="N", help="of the training set, not its own")
    add("--starts", nargs="+", choices=STARTS, metavar="NAME", help="only these initialisations; default: all")
    add("--refinements", nargs="+", choices=REFINEMENTS, default=list(REFINEMENTS), help="only these")
    options = parser.parse_args(argv)
    possible = [start for start in STARTS if start != OTHERS or len(options.data) > 1]
    starts = options.starts or possible
    if not set(starts) <= set(possible):
        parser.error(f"{OTHERS!r} needs at least two data sets, found one: {options.data[0]}.")
    data = [parse_data_set(text) for text in options.data]
    sizes, shares = options.train_images, options.contamination
    record(run(options.out, data, sizes, shares, options.seeds, starts, options.refinements), options.out)
    print(summarise(pd.read_csv(options.out)))


if __name__ == "__main__":
    main()
