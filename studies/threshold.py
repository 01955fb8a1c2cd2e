"""The measurements and the picture of docs/threshold.md: calibrated thresholds on real scores.

    python -m studies.threshold [--data elpv-mono elpv-poly parts/screw:150] [--out docs/figures/threshold.png]
    python -m studies.threshold --density metarefine --data elpv-mono --out metarefine.png

Of the good images of a data set some are trained on: a Gaussian of the patches at each grid position, which takes a
second and rejects nothing, or all of MetaRefine, refinement included, which takes a minute. The others, and
the training images themselves as if each had been left out, are what a threshold is calibrated on; the images that
neither took part in tell what it is worth. Several minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.density.flow import bits_per_dimension, position_code
from anomalib_metarefine.density.gaussian import PositionalGaussian
from anomalib_metarefine.density.scorer import PatchScorer
from anomalib_metarefine.deploy.threshold import calibrate
from anomalib_metarefine.features.embedding import Whitening, image_score
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.settings import Settings
from studies.common import features_of, markdown, refine
from studies.data_sets import parse_data_set

_GOOD, _DEFECTIVE, _LINE = "#56B4E9", "#D55E00", "#000000"  # Okabe and Ito's palette: safe for colour-blind readers
_PATCHES = 60_000  # for the whitening
_FEW = 40  # images, where only an extrapolation is possible
Scorer = Callable[[np.ndarray], np.ndarray]  # rows of a store to raw scores
_SHARES = (0.0, 0.05, 0.1)
_DIRTY = (0.2, 0.4)  # of training sets; no threshold can be calibrated on that, unless refinement cleans it first
_RATES = (0.01, 0.05)


@dataclass(frozen=True)
class Scores:
    """Raw scores of one training.

    Attributes:
        trained (np.ndarray): ``[N]``, of the training images, as the model scores them.
        left_out (np.ndarray): ``[N]``, of the same, each as if it had not been trained on.
        kept (np.ndarray): ``[N]`` of bool, the training images that refinement kept.
        good (np.ndarray): Of the good images that were not trained on.
        defective (np.ndarray): Of the defective ones.
    """

    trained: np.ndarray
    left_out: np.ndarray
    kept: np.ndarray
    good: np.ndarray
    defective: np.ndarray


class Outcome(NamedTuple):
    """What a threshold did to images that had no part in it."""

    rate: float
    bound: float
    found: float
    set_aside: int
    band: float
    stated_band: float


def features(data: DataSet) -> tuple[FeatureStore, np.ndarray]:
    """Features of all images, and whether they are defective."""
    import pandas as pd

    datamodule = data.datamodule(0)
    datamodule.setup()
    samples = pd.concat([datamodule.train_data.samples, datamodule.test_data.samples])
    samples = samples[samples.label_index >= 0]
    store, _ = features_of(samples.image_path, data)
    return store, samples.label_index.to_numpy() == 1


def train(store: FeatureStore, defective: np.ndarray, images: int, share: float, seed: int, density: str) -> Scores:
    """Fit a density on ``images``, of which a share is defective, and score everything."""
    rng = np.random.default_rng(seed)
    good, bad = rng.permutation(np.flatnonzero(~defective)), rng.permutation(np.flatnonzero(defective))
    dirty = round(share * images)
    rows = np.concatenate([good[: images - dirty], bad[:dirty]])
    fit = {"gaussian": _fit_gaussian, "metarefine": _fit_metarefine}[density]
    score, left_out, kept = fit(store, rows, seed)
    # The good images that defective ones took the place of are not tested on: the test set is the same for every share.
    return Scores(score(rows), left_out, kept, score(good[images:]), score(bad[dirty:]))


@torch.no_grad()
def _fit_gaussian(store: FeatureStore, rows: np.ndarray, seed: int) -> tuple[Scorer, np.ndarray, np.ndarray]:
    settings = Settings()
    picked = store.images(rows.tolist())
    flat = picked.flatten(0, 1)
    sample = torch.from_numpy(np.random.default_rng(seed).permutation(len(flat))[:_PATCHES])
    whitening = Whitening.fit(flat[sample], settings.dimensions)
    gaussian = PositionalGaussian.fit(whitening(picked).split(32), settings.shrinkage)

    @torch.no_grad()
    def score(chosen: np.ndarray, leave_one_out: bool = False) -> np.ndarray:
        scores = []
        for part in np.array_split(chosen, max(1, len(chosen) // 32)):
            z = gaussian(whitening(store.images(part.tolist())))
            log_det = gaussian.log_det.expand(z.shape[:2])
            if leave_one_out:
                z, log_det = gaussian.leave_one_out(z)
            scores.append(image_score(bits_per_dimension(z, log_det), settings.tail))
        return torch.cat(scores).double().numpy()

    return score, score(rows, leave_one_out=True), np.ones(len(rows), dtype=bool)


def _fit_metarefine(store: FeatureStore, rows: np.ndarray, seed: int) -> tuple[Scorer, np.ndarray, np.ndarray]:
    settings = Settings()
    training = FeatureStore(4096)
    training.add([f"{place:06d}" for place in range(len(rows))], store.images(rows.tolist()))
    side = math.isqrt(store.shape[0])  # ELPV's images are square
    result = refine((training, (side, side)), seed)
    density, flow = result.density, result.density.flow
    flow.load_state_dict({name: value.detach() for name, value in density.parameters.items()}, strict=False)
    scorer = PatchScorer()
    scorer.load(density, flow, position_code(side, side))

    @torch.no_grad()
    def score(chosen: np.ndarray) -> np.ndarray:
        parts = np.array_split(chosen, max(1, len(chosen) // 32))
        scores = [image_score(scorer(store.images(part.tolist())), settings.tail) for part in parts]
        return torch.cat(scores).double().numpy()

    return score, result.scales.parts["likelihood"], result.kept


def judge(
    calibrated_on: np.ndarray, good: np.ndarray, defective: np.ndarray, rate: float, left_out: int = 0
) -> Outcome:
    """Calibrate, and try the threshold on other images."""
    found = calibrate(calibrated_on, rate, left_out=left_out)
    band = found.uncertain
    return Outcome(
        float((good > found.threshold).mean()),
        found.bound,
        float((defective > found.threshold).mean()),
        found.set_aside,
        float(((good > band.lower) & (good <= band.upper)).mean()),
        band.expected_share,
    )


def on_held_out(clean: list[Scores], images: int, share: float, rate: float, repeats: int) -> list[Outcome]:
    """Calibrations on random parts of the good images that were not trained on, with defective ones among them."""
    rng = np.random.default_rng(1)
    outcomes = []
    for repeat in range(repeats):
        scores = clean[repeat % len(clean)]
        good, bad = rng.permutation(scores.good), rng.permutation(scores.defective)
        dirty = round(share * images)
        mixed = np.concatenate([good[: images - dirty], bad[:dirty]])
        # The same images are left to test on for every share.
        outcomes.append(judge(mixed, good[images:], bad[dirty:], rate))
    return outcomes


def row(name: str, images: int, share: float, rate: float, outcomes: list[Outcome]) -> list[str]:
    """One row of the table: means over the calibrations."""
    values = np.array(outcomes)
    means = values.mean(0)
    return [
        name, str(images), f"{share:.0%}", f"{rate:.0%}", f"{means[0]:.2%}", f"{np.quantile(values[:, 0], 0.95):.1%}",
        f"{means[1]:.2%}", f"{(values[:, 0] <= values[:, 1]).mean():.0%}", f"{means[2]:.0%}", f"{means[3]:.1f}",
        f"{means[4]:.1%} ({means[5]:.1%})",
    ]  # fmt: skip


_HEADER = ["calibrated on", "images", "defective", "stated", "false alarms", "95 % below", "bound", "bound kept",
           "defects found", "set aside", "uncertain (stated)"]  # fmt: skip


def table(
    data: DataSet, store: FeatureStore, defective: np.ndarray, seeds: list[int], repeats: int, density: str
) -> list[Scores]:
    """Print the table of one data set; return its clean trainings."""
    images = data.train_images or 0.6 * (~defective).sum()
    shares = _SHARES + _DIRTY if density == "metarefine" else _SHARES
    by_share = {
        share: [train(store, defective, int(images), share, seed, density) for seed in seeds] for share in shares
    }
    clean = by_share[0.0]
    half = len(clean[0].good) // 2
    rows = []
    for rate in _RATES:
        rows += [
            row("held out", size, share, rate, on_held_out(clean, size, share, rate, repeats))
            for share in _SHARES
            for size in (_FEW, half)
        ]
        for share, trained in by_share.items():
            outcomes = [judge(scores.left_out, scores.good, scores.defective, rate) for scores in trained]
            rows.append(row("training, left out", int(images), share, rate, outcomes))
            if density == "metarefine":
                outcomes = [
                    judge(s.left_out[s.kept], s.good, s.defective, rate, left_out=int((~s.kept).sum())) for s in trained
                ]
                rows.append(row("training, left out, kept", int(images), share, rate, outcomes))
        outcomes = [judge(scores.trained, scores.good, scores.defective, rate) for scores in clean]
        rows.append(row("training, as scored", int(images), 0.0, rate, outcomes))
    print(f"\n{data.name}: {len(clean[0].good)} good images that were not trained on, {defective.sum()} defective\n")
    print(markdown(_HEADER, sorted(rows, key=lambda cells: (cells[3], cells[0]))), flush=True)
    return clean


def draw(scores: Scores, path: Path) -> None:
    """Histogram of held-out scores, and the threshold for every number of images and share of defects."""
    rng = np.random.default_rng(0)
    good, bad = rng.permutation(scores.good), rng.permutation(scores.defective)
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9, 6.5), height_ratios=[1, 1], layout="constrained")
    end = float(np.quantile(bad, 0.95))
    bins = np.linspace(min(good.min(), bad.min()), end, 60)
    above.hist(good, bins, color=_GOOD, edgecolor="white", linewidth=0.4, label=f"good ({len(good)})")
    above.hist(
        bad, bins, color=_DEFECTIVE, alpha=0.6, edgecolor="white", linewidth=0.4, label=f"defective ({len(bad)})"
    )
    above.set(ylabel="images", title="ELPV monocrystalline, images that the model has not seen")
    above.legend()
    labels = []
    for size in (25, 50, len(good) // 2, len(good)):
        for share in _SHARES:
            dirty = round(share * size)
            found = calibrate(np.concatenate([good[: size - dirty], bad[:dirty]]), 0.01)
            position = len(labels)
            band = found.uncertain
            below.barh(position, band.upper - band.lower, left=band.lower, height=0.7, color=_LINE, alpha=0.15)
            below.vlines(found.threshold, position - 0.35, position + 0.35, color=_LINE, linewidth=2)
            ranked = np.sort(np.concatenate([good[: size - dirty], bad[:dirty]]))
            kept = ranked[: size - found.set_aside]
            below.plot(kept, np.full(len(kept), position), "|", color=_GOOD, markersize=7)
            aside = ranked[size - found.set_aside :]
            below.plot(aside.clip(max=end), np.full(len(aside), position), "x", color=_DEFECTIVE, markersize=4)
            text = f"at most {found.bound:.1%}; finds {(bad > found.threshold).mean():.0%}"
            below.text(end * 1.02, position, text, va="center", fontsize=9)
            labels.append(f"{size} images, {share:.0%} defective")
    below.set_yticks(range(len(labels)), labels)
    below.invert_yaxis()
    below.set(
        xlim=(bins[0], end),
        xlabel="raw image score (bits per dimension)",
        title="Threshold for 1 % false alarms (line), uncertain scores (grey), scores kept (|) and set aside (x)",
    )
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Compute everything, print the tables, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["elpv-mono", "elpv-poly"], help="data sets (default: ELPV)")
    parser.add_argument("--density", choices=["gaussian", "metarefine"], default="gaussian", help="what is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training sets")
    parser.add_argument("--repeats", type=int, default=200, help="calibrations on held-out images, for each row")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/threshold.png"), help="the picture to write")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    for spec in arguments.data:
        data = parse_data_set(spec)
        clean = table(data, *features(data), arguments.seeds, arguments.repeats, arguments.density)
        if spec == "elpv-mono":
            draw(clean[0], arguments.out)
            print(f"\nWrote {arguments.out}")


if __name__ == "__main__":
    main()
