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
import itertools
import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.features.embedding import image_score
from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.refinement.fitting import fit_density, likelihoods
from anomalib_metarefine.settings import Settings, seed_for
from studies.common import (
    Features,
    add_grid,
    all_features,
    dirty_set,
    finished,
    markdown,
    record,
    spread,
)
from studies.common import (
    begin as meta_trained,
)
from studies.data_sets import parse_data_set

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

KEY = ["data", "contamination", "seed", "score"]
EPISODES = 20
AGGREGATES = {
    "mean": lambda scores: np.nanmean(scores, 0),
    "lower quartile": lambda scores: np.nanquantile(scores, 0.25, 0),
    "spread": lambda scores: np.nanstd(scores, 0),
}
_NEIGHBOUR_TAIL = 0.02  # as in the score that refinement uses, so that only the supports differ


def run(
    done: set[tuple], data: Sequence[DataSet], shares: Sequence[float], seeds: Sequence[int], sizes: Sequence[int]
) -> Iterator[dict[str, object] | str]:
    """Score the images of every training set that is not in the table yet; all data sets of one seed, then the next.

    Args:
        done (set[tuple]): Keys of earlier rows, in the order of `KEY`.
        data (Sequence[DataSet]): Data sets.
        shares (Sequence[float]): Shares of dirty training images, in (0, 1).
        seeds (Sequence[int]): Which images are drawn, which of them are supports, and all initialisations.
        sizes (Sequence[int]): Images of a support set.

    Yields:
        dict[str, object] | str: A row: `KEY`, images, dirty ones, AUROC, seconds (all that the score needs except the
            backbone; shared by the aggregates of one score); or why a training set can't be had.
    """
    features: dict[str, Features] = {}
    for seed, data_set, contamination in itertools.product(seeds, data, shares):
        key = (data_set.name, contamination, seed)
        if all((*key, name) in done for name in _names(sizes)):
            continue
        try:
            datamodule = dirty_set(data_set, contamination, seed)
            _check(len(datamodule.train_data), sizes)
        except ValueError as error:
            yield f"{data_set.name}, contamination {contamination:g}, seed {seed} left out: {error}"
            continue
        if data_set.name not in features:
            features[data_set.name] = all_features(datamodule, data_set)
        store, grid = features[data_set.name]
        paths = sorted(datamodule.train_data.samples.image_path.astype(str))
        dirty = np.isin(paths, datamodule.injected)
        counts = {"images": len(paths), "dirty": int(dirty.sum())}
        for name, scores, seconds in _scores((store.of(paths), grid), seed, sizes):
            if (*key, name) not in done:
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


def _scores(features: Features, seed: int, sizes: Sequence[int]) -> Iterator[tuple[str, np.ndarray, float]]:
    """Name, scores ``[N]`` and seconds of everything compared, for images sorted by path."""
    store, grid = features
    images = len(store)
    settings, references = Settings(), seed_for(seed, "references")
    supports = {size: draw_supports(images, size, seed) for size in sizes}

    begin = time.perf_counter()
    neighbours = NearestImages(store, grid, references)
    halves = image_score(neighbours.episodic(np.ones(images, dtype=bool))[0], _NEIGHBOUR_TAIL).numpy()
    yield "neighbours, random halves", halves, time.perf_counter() - begin

    begin = time.perf_counter()
    neighbours = NearestImages(store, grid, references, references=images, nearest=images)
    comparing = time.perf_counter() - begin
    for size, masks in supports.items():
        begin = time.perf_counter()
        found = aggregate(support_distances(neighbours, masks), masks)
        seconds = comparing + time.perf_counter() - begin
        for name, scores in found.items():
            yield f"neighbours, {size} images, {name}", scores, seconds

    begin = time.perf_counter()
    whitened, flow, initial = meta_trained(features, seed, settings)
    learning = time.perf_counter() - begin

    def adapted(support: np.ndarray) -> np.ndarray:
        density = fit_density(whitened, support, None, flow, initial, settings, seed)
        return likelihoods(whitened, density, support)

    scores = adapted(np.ones(images, dtype=bool))
    yield "flow, all images", scores, time.perf_counter() - begin

    for size, masks in supports.items():
        begin = time.perf_counter()
        found = aggregate(np.stack([adapted(support) for support in masks]), masks)
        seconds = learning + time.perf_counter() - begin
        for name, scores in found.items():
            yield f"flow, {size} images, {name}", scores, seconds


def summarise(rows: pd.DataFrame) -> str:
    """A Markdown table of the AUROC, mean ± standard deviation over seeds: a row a score, a column a training set."""
    columns = list(dict.fromkeys(zip(rows.data, rows.contamination, strict=True)))
    cells = {key: spread(aurocs, 3) for key, aurocs in rows.groupby(["score", "data", "contamination"]).AUROC}
    return markdown(
        ["score", *(f"{data}, {share:.0%}" for data, share in columns)],
        ([score, *(cells.get((score, *column), "") for column in columns)] for score in rows.score.unique()),
    )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser, [0.2, 0.4])
    parser.add_argument("--support", type=int, nargs="+", default=[16, 8], help="images of a support set")
    options = parser.parse_args(argv)
    data = [parse_data_set(spec) for spec in options.data]
    done = finished(options.out, KEY)
    record(run(done, data, options.contamination, options.seeds, options.support), options.out)
    print(summarise(pd.read_csv(options.out)))


if __name__ == "__main__":
    main()
