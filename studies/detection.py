"""Does curation find the dirty images? Known contamination, every rule and every score, one row a training set.

    python -m studies.detection --out detection.csv --data elpv-mono screw:150 --looks 0 20

With ``--looks``, a person who never errs answers about the images most probably dirty among those not rejected, and the
set is curated again. Features of a data set are computed once; what is timed and measured after that is the curation's
own code.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.settings import Settings
from studies.common import (
    Features,
    add_grid,
    all_features,
    dirty_set,
    finished,
    markdown,
    record,
    refine,
    spread,
)
from studies.data_sets import parse_data_set

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Weights of likelihood, neighbours and likeness in the score.
SCORES = {
    "likeness": (0.0, 1.0, Settings().likeness_weight),
    "neighbours": (0.0, 1.0, 0.0),
    "likelihood": (1.0, 0.0, 0.0),
    "both": (1.0, 1.0, 0.0),
}
KEY = ["data", "contamination", "seed", "score", "rule", "looks"]


def run(
    done: set[tuple],
    data: Sequence[DataSet],
    contaminations: Sequence[float],
    seeds: Sequence[int],
    scores: Sequence[str],
    rules: Sequence[str],
    looks: Sequence[int],
) -> Iterator[dict[str, object] | str]:
    """Curate every training set that is not in the table yet.

    Args:
        done (set[tuple]): Keys of earlier rows, in the order of `KEY`.
        data (Sequence[DataSet]): Data sets.
        contaminations (Sequence[float]): Shares of dirty training images, in [0, 1).
        seeds (Sequence[int]): Which images are drawn, and all initialisations.
        scores (Sequence[str]): Keys of `SCORES`.
        rules (Sequence[str]): Rejection rules.
        looks (Sequence[int]): How many images a person looks at.

    Yields:
        dict[str, object] | str: A row: `KEY`, dirty ones among those looked at, images, dirty and rejected ones,
            precision, recall, AUROC of the last score, rounds, seconds without the backbone; or why a training set
            can't be had.
    """
    for data_set in data:
        features: Features | None = None
        for seed, contamination in itertools.product(seeds, contaminations):
            keys = [(data_set.name, contamination, seed, *one) for one in itertools.product(scores, rules, looks)]
            wanted = [key for key in keys if key not in done]
            if not wanted:
                continue
            try:
                datamodule = dirty_set(data_set, contamination, seed)
            except ValueError as error:
                yield f"{data_set.name}, contamination {contamination:g}, seed {seed} left out: {error}"
                continue
            features = features or all_features(datamodule, data_set)
            paths = sorted(datamodule.train_data.samples.image_path.astype(str))
            part = features[0].of(paths), features[1]
            dirty = np.isin(paths, datamodule.injected)
            for key in wanted:
                yield dict(zip(KEY, key, strict=True)) | _curate(part, dirty, seed, *key[3:])


def _curate(features: Features, dirty: np.ndarray, seed: int, score: str, rule: str, looks: int) -> dict[str, object]:
    weights = zip(("likelihood_weight", "neighbour_weight", "likeness_weight"), SCORES[score], strict=True)
    settings = {"rule": rule, **dict(weights)}
    begin = time.perf_counter()
    answers: dict[int, bool] = {}
    for _ in range(2 if looks else 1):
        refinement = refine(features, seed, answers=answers, **settings).refinement
        scores, rejected = np.array(refinement.scores), ~np.array(refinement.kept)
        if not answers:
            asked = np.lexsort((-scores, rejected))[:looks]
            answers = {int(image): not dirty[image] for image in asked}
    seconds = time.perf_counter() - begin

    def auroc(values: Sequence[float]) -> float:
        return roc_auc_score(dirty, values) if dirty.any() else float("nan")

    return {
        "asked_dirty": int(dirty[list(answers)].sum()),
        "images": len(dirty),
        "dirty": int(dirty.sum()),
        "rejected": int(rejected.sum()),
        "precision": dirty[rejected].mean() if rejected.any() else float("nan"),
        "recall": rejected[dirty].mean() if dirty.any() else float("nan"),
        "last_AUROC": auroc(scores),
        "rounds": len(refinement.rounds),
        "stop_reason": refinement.stop_reason,
        "seconds": seconds,
    }


def summarise(rows: pd.DataFrame) -> str:
    """A Markdown table, means and standard deviations over seeds."""
    lines = []
    for key, group in rows.groupby(KEY[:2] + KEY[3:], sort=False):
        data, share, score, rule, looks = key
        # A rule that rejects nothing has no precision: the mean is over the images of all seeds.
        found = (group.precision.fillna(0) * group.rejected).sum()
        precision = f"{found / group.rejected.sum():.2f}" if group.rejected.sum() else ""
        rejected = f"{group.rejected.mean():.1f} ({', '.join(map(str, group.rejected))})"
        texts = (spread(group.recall, 3), spread(group.last_AUROC, 3))
        lines.append([data, score, f"`{rule}`", str(looks), f"{share:.0%}", rejected, precision, *texts])
    return markdown(["data", "score", "rule", "looks", "dirty", "rejected", "precision", "recall", "AUROC"], lines)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser, [0, 0.05, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=["likeness"])
    parser.add_argument("--rules", nargs="+", default=[Settings().rule])
    parser.add_argument("--looks", type=int, nargs="+", default=[0], metavar="K", help="images that a person looks at")
    options = parser.parse_args(argv)
    data = [parse_data_set(spec) for spec in options.data]
    grid = (options.contamination, options.seeds, options.scores, options.rules, options.looks)
    record(run(finished(options.out, KEY), data, *grid), options.out)
    print(summarise(pd.read_csv(options.out)))


if __name__ == "__main__":
    main()
