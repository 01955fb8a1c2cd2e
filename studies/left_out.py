"""What left-out scores of the training promise: with few images, and with defective ones among them.

    python -m studies.left_out parts/screw@256x256 parts/aliens@224x320

Folders in MVTec layout. A Gaussian of the patches at each grid position is fitted on some of the good images, with
defective ones among them, none rejected: the worst case of a refinement. The threshold comes from their leave-one-out
scores, in three ways; the images that took no part tell what it is worth. A minute a folder on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from anomalib_metarefine.deploy.threshold import _Tail, calibrate
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE, Backbone
from anomalib_metarefine.features.extract import Recipe, collect_features
from anomalib_metarefine.features.store import FeatureStore
from studies.common import markdown
from studies.threshold import train

_IMAGES = (20, 40, 60, 100)
_DIRTY = (0.0, 0.2)
_FEWEST_NEW = 15  # good images to try a threshold on
_RATE = 0.01


def features(folder: Path, size: tuple[int, int]) -> tuple[FeatureStore, np.ndarray]:
    """Features of all images of a data set, and whether they are defective."""
    paths = sorted([*(folder / "train").rglob("*.*"), *(folder / "test").rglob("*.*")])
    store, *_ = collect_features(paths, Recipe(Backbone(), OFFLINE_BACKBONE, size), 4096)
    return store, np.array([Path(path).parent.name != "good" for path in store.paths])


def thresholds(scores: np.ndarray) -> dict[str, float]:
    """As `calibrate` has it, from the fitted tail alone, and mirrored from the lower side about the median."""
    ordered = np.sort(scores)
    low, median = np.quantile(ordered, [_RATE, 0.5])
    return {
        "calibrate": calibrate(scores, _RATE).threshold,
        "tail alone": _Tail.fit(ordered).score(_RATE),
        "lower side": float(2 * median - low),
    }


def table(name: str, store: FeatureStore, defective: np.ndarray, repeats: int) -> list[list[str]]:
    """Rows for every number of images and share of defective ones."""
    rows = []
    for images in (count for count in _IMAGES if count + _FEWEST_NEW <= (~defective).sum()):
        for share in _DIRTY:
            trained = [train(store, defective, images, share, seed, "gaussian") for seed in range(repeats)]
            bound = np.array([calibrate(scores.left_out, _RATE).bound for scores in trained])
            for way in thresholds(trained[0].left_out):
                limits = [thresholds(scores.left_out)[way] for scores in trained]
                alarms, found = (
                    np.array([(getattr(scores, kind) > at).mean() for scores, at in zip(trained, limits, strict=True)])
                    for kind in ("good", "defective")
                )
                rows.append([
                    name, str(images), f"{share:.0%}", way, f"{alarms.mean():.1%} ({alarms.max():.0%})",
                    f"{bound.mean():.1%}", f"{(alarms <= bound).mean():.0%}", f"{found.mean():.0%}",
                ])  # fmt: skip
    return rows


def main() -> None:
    """Print a table for every folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER@HxW")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    header = ["data", "images", "defective", "threshold", "false alarms, mean (worst)", "bound", "bound kept", "found"]
    for folder, size in (entry.split("@") for entry in options.folders):
        height, width = map(int, size.split("x"))
        rows = table(Path(folder).name, *features(Path(folder), (height, width)), options.repeats)
        print(markdown(header, rows), flush=True)


if __name__ == "__main__":
    main()
