"""Does curation find the dirty images? Known contamination, every rule and every score, one row a training set.

    python -m studies.detection --out detection.csv --data elpv-mono screw:150 --looks 0 20

With ``--looks``, a person who never errs answers about the images most probably dirty among those not rejected, and the
set is curated again. Features of a data set are computed once; what is timed and measured after that is the curation's
own code.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
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
from anomalib_metarefine.data.contamination import Contaminated
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE, Backbone
from anomalib_metarefine.features.extract import collect_features
from anomalib_metarefine.refinement.engine import DensityFitter, FitSettings, new_flow
from anomalib_metarefine.refinement.posterior import estimate_contamination, further_scales

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from anomalib_metarefine.features.store import FeatureStore

# Weights of likelihood, neighbours and likeness in the score.
SCORES = {
    "likeness": (0.0, 1.0, FitSettings.likeness_weight),
    "neighbours": (0.0, 1.0, 0.0),
    "likelihood": (1.0, 0.0, 0.0),
    "both": (1.0, 1.0, 0.0),
}
KEY = ["data", "contamination", "seed", "score", "rule", "looks"]


def run(
    done: pd.DataFrame,
    data: Sequence[DataSet],
    contaminations: Sequence[float],
    seeds: Sequence[int],
    scores: Sequence[str],
    rules: Sequence[str],
    looks: Sequence[int],
) -> Iterator[dict[str, object] | str]:
    """Curate every training set that is not in the table yet.

    Args:
        done (pd.DataFrame): Rows of earlier runs, with the columns `KEY`.
        data (Sequence[DataSet]): Data sets.
        contaminations (Sequence[float]): Shares of dirty training images, in [0, 1).
        seeds (Sequence[int]): Which images are drawn, and all initialisations.
        scores (Sequence[str]): Keys of `SCORES`.
        rules (Sequence[str]): Rejection rules.
        looks (Sequence[int]): How many images a person looks at.

    Yields:
        dict[str, object] | str: A row: `KEY`, dirty ones among those looked at, images, dirty and rejected ones,
            precision, recall, AUROC of the first and of the last score, estimate and interval of the contamination,
            rounds, seconds without the backbone; or why a training set can't be had.
    """
    finished = set(done[KEY].itertuples(index=False, name=None))
    for data_set in data:
        features: tuple[FeatureStore, tuple[int, int]] | None = None
        for seed in seeds:
            for contamination in contaminations:
                wanted = [
                    one
                    for one in itertools.product(scores, rules, looks)
                    if (data_set.name, contamination, seed, *one) not in finished
                ]
                if not wanted:
                    continue
                datamodule = Contaminated(
                    data_set.datamodule(seed), contamination, "no-overlap", seed, data_set.train_images
                )
                try:
                    datamodule.setup()
                except ValueError as error:
                    yield f"{data_set.name}, contamination {contamination:g}, seed {seed} left out: {error}"
                    continue
                if features is None:
                    features = all_features(datamodule, data_set)
                paths = datamodule.train_data.samples.image_path.astype(str).tolist()
                for one in wanted:
                    key = (data_set.name, contamination, seed, *one)
                    found = _curate(*features, paths, set(datamodule.injected), seed, *one)
                    yield dict(zip(KEY, key, strict=True)) | found


def all_features(datamodule: Contaminated, data_set: DataSet) -> tuple[FeatureStore, tuple[int, int]]:
    """Features of every image, whichever set it may be drawn for.

    Args:
        datamodule (Contaminated): Where the images come from.
        data_set (DataSet): How they are read.

    Returns:
        tuple[FeatureStore, tuple[int, int]]: Embeddings, and rows and columns of patches.
    """
    source = datamodule.datamodule
    source.setup()
    paths = [*source.train_data.samples.image_path, *source.test_data.samples.image_path]
    return collect_features(
        [Path(path) for path in paths],
        Backbone(OFFLINE_BACKBONE),
        OFFLINE_BACKBONE,
        data_set.image_size,
        32,
        4096,
        lambda _count: None,
    )


def _curate(
    features: FeatureStore,
    grid: tuple[int, int],
    paths: list[str],
    injected: set[str],
    seed: int,
    score: str,
    rule: str,
    looks: int,
) -> dict[str, object]:
    store = features.of(paths)
    weights = zip(("likelihood_weight", "neighbour_weight", "likeness_weight"), SCORES[score], strict=True)
    settings = dataclasses.replace(FitSettings(), rule=rule, **dict(weights))
    flow = new_flow(store.shape[1], settings, seed)
    dirty = np.isin(sorted(paths), list(injected))
    begin = time.perf_counter()
    known: dict[int, bool] = {}
    for _ in range(2 if looks else 1):
        generator = torch.Generator().manual_seed(seed)
        fitter = DensityFitter(store, flow, grid, settings, generator, Progress(disable=True))
        _, refinement = fitter.fit(known)
        scores = np.array(refinement.scores)
        rejected = ~np.array(refinement.kept)
        estimate = estimate_contamination(scores, known=known, further=further_scales(fitter.parts))
        if not known:
            asked = np.lexsort((-scores, -estimate.dirty_probability, rejected))[:looks]
            known = {int(image): not dirty[image] for image in asked}
    seconds = time.perf_counter() - begin
    low, high = estimate.interval()

    def auroc(values: Sequence[float]) -> float:
        return roc_auc_score(dirty, values) if dirty.any() else float("nan")

    return {
        "asked_dirty": int(dirty[list(known)].sum()),
        "images": len(paths),
        "dirty": int(dirty.sum()),
        "rejected": int(rejected.sum()),
        "precision": dirty[rejected].mean() if rejected.any() else float("nan"),
        "recall": rejected[dirty].mean() if dirty.any() else float("nan"),
        "first_AUROC": auroc(refinement.rounds[0].scores),
        "last_AUROC": auroc(scores),
        "estimate": estimate.estimate,
        "low": low,
        "high": high,
        "rounds": len(refinement.rounds),
        "stop_reason": refinement.stop_reason,
        "seconds": seconds,
    }


def summarise(rows: pd.DataFrame) -> str:
    """A Markdown table, means and standard deviations over seeds, and how often the interval held the truth."""
    held = (rows.low - 0.005 <= rows.dirty / rows.images) & (rows.dirty / rows.images <= rows.high + 0.005)
    rows = rows.assign(held=held.astype(float))
    lines = [
        "| data | score | rule | looks | dirty | rejected | precision | recall | AUROC of the score | contamination "
        "| held |"
    ]
    lines.append("|" + "---|" * 11)
    for key, group in rows.groupby(["data", "score", "rule", "looks", "contamination"], sort=False):
        data, score, rule, looks, share = key
        # A rule that rejects nothing has no precision: the mean is over the images of all seeds.
        found = (group.precision.fillna(0) * group.rejected).sum()
        precision = f"{found / group.rejected.sum():.2f}" if group.rejected.sum() else ""
        cells = [
            data, score, f"`{rule}`", str(looks), f"{share:.0%}",
            f"{group.rejected.mean():.1f} ({', '.join(map(str, group.rejected))})", precision,
            _spread(group.recall), _spread(group.last_AUROC),
            f"{group.estimate.mean():.2f} ({group.low.mean():.2f} to {group.high.mean():.2f})",
            f"{int(group.held.sum())} of {len(group)}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    covered = rows.groupby(["score", "rule", "looks"]).held.mean()
    lines += ["", *(f"`{score}`, `{rule}`, {looks} looks: the 90 % interval held the truth in {share:.0%} of the "
                    "training sets." for (score, rule, looks), share in covered.items())]  # fmt: skip
    return "\n".join(lines)


def _spread(values: pd.Series) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def record(rows: Iterable[dict[str, object] | str], out: Path) -> None:
    """Append rows to a CSV file as they come, and print them; a text is printed only."""
    for row in rows:
        if isinstance(row, str):
            print(row, flush=True)
            continue
        pd.DataFrame([row]).to_csv(out, mode="a", header=not out.is_file(), index=False)
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used.
    """
    parser = argparse.ArgumentParser(prog="python -m studies.detection", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV that rows are added to; finished ones stay")
    parser.add_argument("--data", nargs="+", default=[], metavar="WHERE[@HxW][:IMAGES][:NAME]", help="data sets")
    parser.add_argument("--contamination", type=float, nargs="+", default=[0, 0.05, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=["likeness"])
    parser.add_argument("--rules", nargs="+", default=["auto"])
    parser.add_argument("--looks", type=int, nargs="+", default=[0], metavar="K", help="images that a person looks at")
    parser.add_argument("--summary", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(argv)
    done = pd.read_csv(options.out) if options.out.is_file() else pd.DataFrame(columns=KEY)
    try:
        data = [DataSet.parse(spec) for spec in options.data]
        grid = (options.contamination, options.seeds, options.scores, options.rules, options.looks)
        record(run(done, data, *grid), options.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.summary:
        print(summarise(pd.read_csv(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
