"""Which score finds dirty images best: small supports scored by a flow or by neighbours, or one fit on everything?

    python -m studies.episodic --out episodic.csv --data elpv-mono screw:150

In a small support set a given defect is rarely present, so an image outside that has it finds nothing like it there.
Images are scored against the same supports by the meta-learned flow, adapted to each, and by their nearest patches.
Both are compared with one flow adapted to all images, and with the score of refinement: random halves in closed form.

References:
    - Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", arXiv 1703.03400.
    - Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), arXiv 2106.08265.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.benchmark.markdown import markdown
from anomalib_metarefine.data.contamination import Contaminated
from anomalib_metarefine.density.flow import image_score
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.refinement.engine import DensityFitter, FitSettings, new_flow
from studies.detection import all_features, record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anomalib_metarefine.features.store import FeatureStore

KEY = ["data", "contamination", "seed", "score"]
EPISODES = 20
AGGREGATES = {
    "mean": lambda scores: np.nanmean(scores, 0),
    "lower quartile": lambda scores: np.nanquantile(scores, 0.25, 0),
    "spread": lambda scores: np.nanstd(scores, 0),
}
_NEIGHBOUR_TAIL = 0.02  # as in the score that refinement uses, so that only the supports differ


def run(
    done: pd.DataFrame, data: Sequence[DataSet], shares: Sequence[float], seeds: Sequence[int], sizes: Sequence[int]
) -> Iterator[dict[str, object] | str]:
    """Score the images of every training set that is not in the table yet; all data sets of one seed, then the next.

    Args:
        done (pd.DataFrame): Rows of earlier runs, with the columns `KEY`.
        data (Sequence[DataSet]): Data sets.
        shares (Sequence[float]): Shares of dirty training images, in (0, 1).
        seeds (Sequence[int]): Which images are drawn, which of them are supports, and all initialisations.
        sizes (Sequence[int]): Images of a support set.

    Yields:
        dict[str, object] | str: A row: `KEY`, images, dirty ones, AUROC, seconds (all that the score needs except the
            backbone; shared by the aggregates of one score); or why a training set can't be had.
    """
    finished = set(done[KEY].itertuples(index=False, name=None))
    features: dict[str, tuple[FeatureStore, tuple[int, int]]] = {}
    for seed in seeds:
        for data_set in data:
            for contamination in shares:
                key = (data_set.name, contamination, seed)
                if all((*key, name) in finished for name in _names(sizes)):
                    continue
                source = data_set.datamodule(seed)
                datamodule = Contaminated(source, contamination, "no-overlap", seed, data_set.train_images)
                try:
                    datamodule.setup()
                    _check(len(datamodule.train_data), sizes)
                except ValueError as error:
                    yield f"{data_set.name}, contamination {contamination:g}, seed {seed} left out: {error}"
                    continue
                if data_set.name not in features:
                    features[data_set.name] = all_features(datamodule, data_set)
                paths = sorted(datamodule.train_data.samples.image_path.astype(str))
                dirty = np.isin(paths, datamodule.injected)
                counts = {"images": len(paths), "dirty": int(dirty.sum())}
                for name, scores, seconds in _scores(*features[data_set.name], paths, seed, sizes):
                    if (*key, name) not in finished:
                        found = {"AUROC": roc_auc_score(dirty, scores), "seconds": seconds}
                        yield dict(zip(KEY, (*key, name), strict=True)) | counts | found


def draw_supports(images: int, size: int, seed: int) -> np.ndarray:
    """Random support sets of ``size`` images each, as masks ``[E x N]``."""
    return np.random.default_rng((seed, size)).random((EPISODES, images)).argsort(1) < size


def aggregate(scores: np.ndarray, supports: np.ndarray) -> dict[str, np.ndarray]:
    """`AGGREGATES` ``[N]`` of scores ``[E x N]`` over the episodes that an image was outside of; NaN if of none."""
    outside = np.where(supports, np.nan, scores)
    return {name: function(outside) for name, function in AGGREGATES.items()}


def support_distances(neighbours: NearestImages, supports: np.ndarray) -> np.ndarray:
    """Image scores by the distance of every patch to the nearest like it in each support set.

    Args:
        neighbours (NearestImages): Remembers the distance to every image.
        supports (np.ndarray): ``[E x N]`` masks.

    Returns:
        np.ndarray: ``[E x N]``; an image is not its own neighbour.
    """
    scores = []
    for support in supports:
        distances = np.where(support[neighbours.images], neighbours.distances, np.float16(np.inf)).min(2)
        scores.append(image_score(torch.from_numpy(distances).float(), _NEIGHBOUR_TAIL).numpy())
    return np.stack(scores)


def _names(sizes: Sequence[int]) -> list[str]:
    small = [f"{way}, {size} images, {name}" for way in ("neighbours", "flow") for size in sizes for name in AGGREGATES]
    return ["neighbours, random halves", "flow, all images", *small]


def _check(images: int, sizes: Sequence[int]) -> None:
    if images < 2 * max(sizes):
        msg = f"{images} training images are too few for supports of {max(sizes)}. Have twice as many at least."
        raise ValueError(msg)


def _scores(
    features: FeatureStore, grid: tuple[int, int], paths: list[str], seed: int, sizes: Sequence[int]
) -> Iterator[tuple[str, np.ndarray, float]]:
    """Name, scores ``[N]`` and seconds of everything compared, for sorted paths."""
    store, settings = features.of(paths), dataclasses.replace(FitSettings(), rounds=0)
    generator = torch.Generator().manual_seed(seed)
    supports = {size: draw_supports(len(paths), size, seed) for size in sizes}

    begin = time.perf_counter()
    neighbours = NearestImages(store, range(len(paths)), grid, generator)
    halves = image_score(neighbours.episodic(np.ones(len(paths), dtype=bool))[0], _NEIGHBOUR_TAIL).numpy()
    yield "neighbours, random halves", halves, time.perf_counter() - begin

    begin = time.perf_counter()
    neighbours = NearestImages(store, range(len(paths)), grid, generator, references=len(paths), nearest=len(paths))
    comparing = time.perf_counter() - begin
    for size, masks in supports.items():
        begin = time.perf_counter()
        found = aggregate(support_distances(neighbours, masks), masks)
        seconds = comparing + time.perf_counter() - begin
        for name, scores in found.items():
            yield f"neighbours, {size} images, {name}", scores, seconds

    begin = time.perf_counter()
    flow = new_flow(store.shape[1], settings, seed)
    fitter = DensityFitter(store, flow, grid, settings, generator, Progress(disable=True))
    fitter.initial = fitter.meta_train()
    learning = time.perf_counter() - begin
    _, refinement = fitter.fit()
    yield "flow, all images", np.array(refinement.parts["likelihood"]), time.perf_counter() - begin

    def adapted(support: np.ndarray) -> np.ndarray:
        fitter.kept = support
        fitter.density = fitter.fit_kept(support, fitter.initial)
        return fitter.likelihood_scores()

    for size, masks in supports.items():
        begin = time.perf_counter()
        found = aggregate(np.stack([adapted(support) for support in masks]), masks)
        seconds = learning + time.perf_counter() - begin
        for name, scores in found.items():
            yield f"flow, {size} images, {name}", scores, seconds


def summarise(rows: pd.DataFrame) -> str:
    """A Markdown table of the AUROC, mean ± standard deviation over seeds: a row a score, a column a training set."""
    columns = list(dict.fromkeys(zip(rows.data, rows.contamination, strict=True)))
    cells = {
        key: f"{aurocs.mean():.3f}" + (f" ± {aurocs.std():.3f}" if len(aurocs) > 1 else "")
        for key, aurocs in rows.groupby(["score", "data", "contamination"]).AUROC
    }
    return markdown(
        ["score", *(f"{data}, {share:.0%}" for data, share in columns)],
        ([score, *(cells.get((score, *column), "") for column in columns)] for score in rows.score.unique()),
    )


def main(argv: list[str] | None = None) -> int:
    """The command: arguments (``None`` takes those of the process) to exit code, 2 for input that can't be used."""
    parser = argparse.ArgumentParser(prog="python -m studies.episodic", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV that rows are added to; finished ones stay")
    parser.add_argument("--data", nargs="+", default=[], metavar="WHERE[@HxW][:IMAGES][:NAME]", help="data sets")
    parser.add_argument("--contamination", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--support", type=int, nargs="+", default=[16, 8], help="images of a support set")
    parser.add_argument("--summary", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(argv)
    done = pd.read_csv(options.out) if options.out.is_file() else pd.DataFrame(columns=KEY)
    try:
        data = [DataSet.parse(spec) for spec in options.data]
        record(run(done, data, options.contamination, options.seeds, options.support), options.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.summary:
        print(summarise(pd.read_csv(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
