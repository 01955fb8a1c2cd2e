"""Updates of a model against fits from scratch, on features of whole families.

    python -m studies.updates --features FOLDER --out studies/results/updates.csv [--data NAME ...]
    python -m studies.updates --out studies/results/updates.csv --summary

FOLDER holds one NAME.npz a family: ``x`` ``[N x P x D]`` in half precision, ``dirty`` ``[N]`` and ``grid``. A model is
fitted on images of which a tenth is dirty; then images are added (a tenth of them dirty) or forgotten, and the updated
model is compared with

- *same start*: a fit from scratch with the same whitening and start of the flow, which decides about all images anew;
- *scratch*: a fit from scratch of everything.

Columns: largest relative difference of the scores of test images, rank correlation, share of the decisions about
training images that differ, relative difference of the threshold, image AUROC of both, share of the time, and drift.
Times are without the backbone, which a fit from scratch needs for all images and an update for the new ones only.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.density.flow import position_code
from anomalib_metarefine.deploy.threshold import FEWEST_SCORES, calibrate
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.model.memory import Memory
from anomalib_metarefine.model.refit import Fit, change, fit_standing
from anomalib_metarefine.refinement.fitting import image_scores
from anomalib_metarefine.settings import Settings
from studies.common import finished, markdown, record, refine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anomalib_metarefine.density.patch_density import PatchDensity
    from anomalib_metarefine.refinement.engine import Result

_IMAGES, _DIRTY, _SHARES = 100, 0.1, (0.01, 0.1, 0.5)
_SETTINGS = Settings()
_KINDS = ["same start", "scratch"]


@dataclass(frozen=True)
class Family:
    """Features of a family, and which images are dirty."""

    x: np.ndarray
    dirty: np.ndarray
    grid: tuple[int, int]

    def store(self, rows: np.ndarray) -> FeatureStore:
        """In the order of their numbers, which are their paths."""
        store = FeatureStore()
        store.add([f"{row:05d}" for row in rows], torch.from_numpy(self.x[rows]))
        return store


def load(file: Path) -> Family:
    """Read the features of a family."""
    with np.load(file) as data:
        return Family(data["x"], data["dirty"], (int(data["grid"][0]), int(data["grid"][1])))


@torch.no_grad()
def score(density: PatchDensity, family: Family, rows: np.ndarray) -> np.ndarray:
    """Raw scores of images under a density."""
    positions, parts = position_code(*family.grid), np.array_split(rows, len(rows) // 32 + 1)
    maps = [density.score(density.whitening(torch.from_numpy(family.x[part]).float()), positions) for part in parts]
    return image_scores(torch.cat(maps), _SETTINGS.tail)


def threshold(likelihood: np.ndarray, kept: np.ndarray) -> float:
    """From the left-out scores of the kept images; NaN if they are too few."""
    scores = likelihood[kept]
    return calibrate(scores).threshold if len(scores) >= FEWEST_SCORES else float("nan")


@dataclass(frozen=True)
class Model:
    """What is compared: a density, left-out scores and decisions by number of the image, and its time."""

    density: PatchDensity
    likelihood: np.ndarray
    kept: dict[int, bool]
    memory: Memory
    seconds: float

    @classmethod
    def of(cls, found: Result | Fit, rows: np.ndarray, seconds: float) -> Model:
        """Of a fit on the images of these numbers."""
        memory = found.memory if isinstance(found, Fit) else Memory.of(found)
        return cls(
            found.density, found.likelihood, dict(zip(rows.tolist(), found.kept.tolist(), strict=True)), memory, seconds
        )

    @property
    def mask(self) -> np.ndarray:
        """Decisions in order."""
        return np.array(list(self.kept.values()))


def fitted(family: Family, rows: np.ndarray, seed: int, like: Model | None = None) -> Model:
    """A fit from scratch, perhaps with the whitening and the start of another model."""
    start = None
    if like is not None:
        start = (like.memory.whitening, like.density.flow, like.memory.initial)
    begin = time.perf_counter()
    found = refine((family.store(rows), family.grid), seed, start)
    return Model.of(found, rows, time.perf_counter() - begin)


def updated(family: Family, model: Model, rows: np.ndarray, seed: int) -> Model:
    """The model brought from its images to those of ``rows``."""
    begin, old = time.perf_counter(), np.array(list(model.kept))
    stays = np.flatnonzero(np.isin(old, rows))
    added = family.store(np.setdiff1d(rows, old))
    likelihood = model.likelihood[stays]
    if len(added):
        likelihood = np.append(likelihood, score(model.density, family, np.setdiff1d(rows, old)))
    paths = [f"{row:05d}" for row in old]
    changed = change(model.memory, paths, model.mask, stays, added, likelihood, {})
    found = fit_standing(changed, copy.deepcopy(model.density.flow), _SETTINGS, seed, Progress(disable=True))
    return Model.of(found, rows, time.perf_counter() - begin)


def compare(family: Family, ours: Model, theirs: Model, test: np.ndarray) -> dict[str, float]:
    """Scores, decisions, thresholds, AUROC and times of an update and of a fit from scratch."""
    one, other = (score(model.density, family, test) for model in (ours, theirs))
    limits = [threshold(model.likelihood, model.mask) for model in (ours, theirs)]
    tested = (one > limits[0]) != (other > limits[1])
    return {
        "difference": float(np.abs(one / other - 1).max()),
        "correlation": float(spearmanr(one, other).statistic),
        "decided_differently": float(np.mean([ours.kept[row] != theirs.kept[row] for row in theirs.kept])),
        "threshold": limits[0] / limits[1] - 1,
        "tested_differently": float(tested.mean()) if np.isfinite(limits).all() else float("nan"),
        "auroc": 100 * roc_auc_score(family.dirty[test], one),
        "auroc_scratch": 100 * roc_auc_score(family.dirty[test], other),
        "time": ours.seconds / theirs.seconds,
        "drift": ours.memory.drift(ours.mask),
    }


def rows_of(
    name: str, family: Family, seed: int, done: set[tuple], kinds_of_fit: Sequence[str]
) -> Iterator[dict[str, object]]:
    """All comparisons of one family and seed."""
    rng = np.random.default_rng([seed, len(name)])
    clean, dirty = (rng.permutation(np.flatnonzero(family.dirty == kind)) for kind in (False, True))
    images = min(_IMAGES, len(clean) // 2)

    def first(count: int) -> np.ndarray:
        bad = round(_DIRTY * count)
        return np.sort(np.r_[clean[: count - bad], dirty[:bad]])

    most = round(1.5 * images)
    test = np.setdiff1d(np.arange(len(family.x)), first(most))
    if (name, seed, "forget dirty", _DIRTY, "clean") in done:  # the last one
        return
    base = fitted(family, first(images), seed)
    kinds = [("add", share) for share in _SHARES] + [("forget", share) for share in _SHARES]
    for kind, share in kinds:
        if (name, seed, kind, share, kinds_of_fit[-1]) in done:
            continue
        many = max(1, round(share * images))
        forgotten = np.random.default_rng([seed, many]).permutation(first(images))[:many]
        rows = first(images + many) if kind == "add" else np.setdiff1d(first(images), forgotten)
        ours = updated(family, base, rows, seed)
        for against in kinds_of_fit:
            theirs = fitted(family, rows, seed, base if against == "same start" else None)
            about = {"data": name, "seed": seed, "change": kind, "share": share, "against": against, "images": images}
            yield about | compare(family, ours, theirs, test)
    if (name, seed, "ten in a row", 0.5, "one update") not in done:
        model = base
        for step in np.linspace(images, most, 11)[1:].round().astype(int):
            model = updated(family, model, first(step), seed)
        once = updated(family, base, first(most), seed)
        about = {"data": name, "seed": seed, "change": "ten in a row", "share": 0.5, "against": "one update"}
        yield about | {"images": images} | compare(family, model, once, test)
    rows = first(images)[~family.dirty[first(images)]]
    ours, theirs = updated(family, base, rows, seed), fitted(family, rows, seed)
    about = {"data": name, "seed": seed, "change": "forget dirty", "share": _DIRTY, "against": "clean"}
    yield about | {"images": images} | compare(family, ours, theirs, test)


def summary(table: pd.DataFrame) -> str:
    """Means over families and seeds, and the worst family."""
    lines = []
    for (kind, share, against), part in table.groupby(["change", "share", "against"], sort=False):
        gap = (part.auroc - part.auroc_scratch).to_numpy()
        lines.append(
            (
                kind, f"{share:.0%}", against, f"{part.difference.median():.2g}", f"{part.correlation.mean():.3f}",
                f"{part.decided_differently.mean():.1%}", f"{part.threshold.abs().mean():.1%}",
                f"{part.tested_differently.mean():.1%}", f"{gap.mean():+.2f} ({gap.min():+.2f} to {gap.max():+.2f})",
                f"{part.time.mean():.3f}", f"{part.drift.mean():.3f} ({part.drift.max():.3f})",
            )
        )  # fmt: skip
    names = [
        "change",
        "share",
        "against",
        "scores",
        "rank",
        "decisions",
        "threshold",
        "tests",
        "AUROC",
        "time",
        "drift",
    ]
    return markdown(names, lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="CSV that rows are added to; finished ones stay")
    add("--features", type=Path, help="folder of NAME.npz")
    add("--data", nargs="+", metavar="NAME", help="families; default: all in the folder")
    add("--against", nargs="+", choices=_KINDS, default=_KINDS, help="kinds of fits from scratch")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--summary", action="store_true", help="print the table of what is there")
    options = parser.parse_args()
    if options.summary:
        print(summary(pd.read_csv(options.out)))
        return
    key = ["data", "seed", "change", "share", "against"]
    for name in options.data or sorted(file.stem for file in options.features.glob("*.npz")):
        family = load(options.features / f"{name}.npz")
        for seed in options.seeds:
            record(rows_of(name, family, seed, finished(options.out, key), options.against), options.out)


if __name__ == "__main__":
    main()
