"""Does the drift monitor find a line that turns, and is it quiet on one that does not? Streams made from real images.

    python -m studies.drift --scores elpv.npz --data elpv-mono --other elpv-poly
    python -m studies.drift --scores screw.npz --data parts/screw:200

A MetaRefine is trained on good images, and scores the good images that it has not seen: as they are, made brighter or
darker, blurred, and those of another material. The scores are kept in ``--scores``, and are not computed again. A
stream is drawn from them, with replacement, and so is the reference, anew for each stream: the population is then
known, and a reference is as far from it as a sample of its size is. As a check, the reference is also one random half
of the images and the stream drawn from the other, which makes the population of the stream a sample of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.deploy.drift import DriftMonitor
from studies.common import dirty_set, markdown

if TYPE_CHECKING:
    import torch

    from anomalib_metarefine import MetaRefine
    from anomalib_metarefine.benchmark.data_sets import DataSet

GOOD, DEFECTIVE, OTHER = "unchanged", "defective", "other material"
_BRIGHTNESS = (0.7, 0.9, 1.1, 1.2)
_BLUR = (0.5, 1.0, 2.0)  # standard deviation in pixels of the image as it is
_FAR = 100_000  # no detection within the stream sorts behind all


def turns() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What may happen to an image ``[3, H, W]`` in [0, 1], by name."""
    from torchvision.transforms.v2 import functional

    def brighten(image: torch.Tensor, factor: float) -> torch.Tensor:
        return (image * factor).clamp(0, 1)

    def blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
        side = 2 * int(np.ceil(3 * sigma)) + 1
        return functional.gaussian_blur(image, [side, side], [sigma, sigma])

    made = {f"brightness x {factor:g}": lambda image, f=factor: brighten(image, f) for factor in _BRIGHTNESS}
    return made | {f"blur {sigma:g} px": lambda image, s=sigma: blur(image, s) for sigma in _BLUR}


def collect(data: DataSet, other: DataSet | None, seed: int) -> dict[str, np.ndarray]:
    """Train a model, and score what it has not seen.

    Args:
        data (DataSet): Its good images are trained on, as many as it says, and the others are the population.
        other (DataSet | None): Good images of it are the new material.
        seed (int): Of the training.

    Returns:
        dict[str, np.ndarray]: Raw scores ``[N]`` by `GOOD`, `DEFECTIVE`, `OTHER` and the names of `turns`.
    """
    from anomalib_metarefine.benchmark.training import quiet
    from anomalib_metarefine.model.calibration import raw_scores

    quiet()
    model, trained_on = _train(data, seed)
    good, defective = _images(data, seed)
    good = [path for path in good if path not in trained_on]
    scores = {GOOD: raw_scores(model, good).image}
    for name, turn in turns().items():
        scores[name] = raw_scores(model, good, change=turn).image
    if other is not None:
        scores[OTHER] = raw_scores(model, _images(other, seed)[0][: len(good)]).image
    return scores | {DEFECTIVE: raw_scores(model, defective).image}


def _train(data: DataSet, seed: int) -> tuple[MetaRefine, set[str]]:
    """A model, and the images that it knows."""
    from anomalib.engine import Engine
    from lightning import seed_everything

    from anomalib_metarefine import MetaRefine

    seed_everything(seed, verbose=False)
    datamodule = dirty_set(data, 0.0, seed)
    model = MetaRefine(image_size=data.image_size, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, enable_model_summary=False, limit_val_batches=0)
        engine.fit(model, datamodule=datamodule)
    return model.eval().cpu(), set(datamodule.train_data.samples.image_path.astype(str))


def _images(data: DataSet, seed: int) -> tuple[list[str], list[str]]:
    """Paths of all good and of all defective images, in a fixed random order."""
    import pandas as pd

    datamodule = data.datamodule(seed)
    datamodule.setup()
    samples = pd.concat([datamodule.train_data.samples, datamodule.test_data.samples]).sample(frac=1, random_state=seed)
    paths = samples.image_path.astype(str)
    return paths[samples.label_index == 0].tolist(), paths[samples.label_index == 1].tolist()


@dataclass
class Lines:
    """Streams of one population.

    Attributes:
        scores (dict[str, np.ndarray]): What `collect` gave.
        images (int): Of every reference that is drawn.
        rate (float): False-alarm rate of the monitors, for ``horizon`` images.
        horizon (int): See there.
        rng (np.random.Generator): Draws everything.
    """

    scores: dict[str, np.ndarray]
    images: int
    rate: float
    horizon: int
    rng: np.random.Generator

    def false_alarms(self, streams: int, length: int, defects: float) -> int:
        """How many of the unchanged streams of ``length`` images, a share of them defective, raise an alarm."""
        return sum(self._first_alarm(self._draw(GOOD, length, defects)) <= length for _ in range(streams))

    def false_alarms_of_halves(self, streams: int, length: int, defects: float) -> int:
        """The same with one half of the images as the reference, and streams of the other half."""
        found = 0
        for _ in range(streams):
            reference, rest = np.array_split(self.rng.permutation(self.scores[GOOD]), 2)
            half = replace(self, scores={**self.scores, GOOD: rest})
            found += half._first_alarm(half._draw(GOOD, length, defects), reference=reference) <= length
        return found

    def delays(self, turn: str, streams: int, before: int, after: int) -> np.ndarray:
        """Images from the turn, after ``before`` unchanged ones, to the alarm; `_FAR` where there is none."""
        found = []
        for _ in range(streams):
            stream = np.concatenate([self._draw(GOOD, before), self._draw(turn, after)])
            found.append(self._first_alarm(stream, before))
        return np.array(found)

    def _draw(self, name: str, length: int, defects: float = 0.0) -> np.ndarray:
        drawn = self.rng.choice(self.scores[name], length)
        if not defects:
            return drawn
        return np.where(self.rng.random(length) < defects, self.rng.choice(self.scores[DEFECTIVE], length), drawn)

    def _first_alarm(self, stream: np.ndarray, before: int = 0, reference: np.ndarray | None = None) -> int:
        """Number of images after ``before`` at which the monitor first says that scores have drifted."""
        if reference is None:
            reference = self.rng.choice(self.scores[GOOD], self.images)
        quantiles = np.quantile(reference, np.linspace(0, 1, 101))
        monitor = DriftMonitor(quantiles, len(reference), false_alarm_rate=self.rate, horizon=self.horizon)
        for count, score in enumerate(stream, start=1):
            if monitor.update(score).drifted and count > before:
                return count - before
        return _FAR


def false_alarm_rows(
    scores: dict[str, np.ndarray], sizes: Sequence[int], rates: Sequence[float], streams: int, length: int, seed: int
) -> list[list[str]]:
    """Rows of the first table: the rate is for the length of the streams, so the two can be compared."""
    rows = []
    for images in sizes:
        for rate in rates:
            lines = Lines(scores, images, rate, length, np.random.default_rng(seed))
            found = [lines.false_alarms(streams, length, defects) for defects in (0.0, 0.05)]
            rows.append([str(images), f"{rate:.0%}", *(f"{count} of {streams}" for count in found)])
    for rate in rates:
        lines = Lines(scores, 0, rate, length, np.random.default_rng(seed))
        found = [lines.false_alarms_of_halves(streams, length, defects) for defects in (0.0, 0.05)]
        rows.append([f"half ({len(scores[GOOD]) // 2})", f"{rate:.0%}", *(f"{count} of {streams}" for count in found)])
    return rows


def delay_rows(
    scores: dict[str, np.ndarray], images: int, streams: int, before: Sequence[int], after: int, seed: int
) -> list[list[str]]:
    """Rows of the second table."""
    rows = []
    for turn, turned in scores.items():
        if turn in (GOOD, DEFECTIVE):
            continue
        above = [f"{(turned > np.quantile(scores[GOOD], level)).mean():.0%}" for level in (0.5, 0.9)]
        cells = []
        for begin in before:
            lines = Lines(scores, images, 0.01, 10_000, np.random.default_rng(seed))
            cells.append(_describe(lines.delays(turn, streams, begin, after)))
        rows.append([turn, *above, *cells])
    return rows


def _describe(delays: np.ndarray) -> str:
    share = (delays < _FAR).mean()
    if share < 0.5:
        return f"{share:.0%} found"
    late = np.quantile(delays, 0.9, method="higher")
    return f"{np.median(delays):.0f} ({f'{late:.0f}' if late < _FAR else 'never'}); {share:.0%} found"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.drift",
        description="False alarms and delays of the drift monitor, on streams made from real images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--scores", type=Path, required=True, help="NPZ file; written by the first run, then read")
    parser.add_argument("--data", default="elpv-mono", metavar="WHERE[@HxW][:TRAIN_IMAGES][:NAME]", help="the line")
    parser.add_argument("--other", metavar="WHERE", help="the new material")
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the streams")
    parser.add_argument("--references", type=int, nargs="+", default=[50, 300], help="images of the reference")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.1], help="stated false-alarm rates")
    parser.add_argument("--streams", type=int, default=200, help="unchanged streams, for each row and share of defects")
    parser.add_argument("--length", type=int, default=2_000, help="images of an unchanged stream")
    parser.add_argument("--turned", type=int, default=50, help="turned streams of each kind")
    parser.add_argument("--before", type=int, nargs="+", default=[0, 1_000], help="images before the turn")
    parser.add_argument("--after", type=int, default=2_000, help="images from the turn on")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used.
    """
    options = build_parser().parse_args(argv)
    try:
        if not options.scores.is_file():
            from studies.data_sets import parse_data_set

            other = parse_data_set(options.other) if options.other else None
            np.savez(options.scores, **collect(parse_data_set(options.data), other, options.seed))
        with np.load(options.scores) as stored:
            scores = dict(stored)
    except (ValueError, OSError) as error:
        print(f"drift: {error}", file=sys.stderr)
        return 2
    print(f"{len(scores[GOOD])} good and {len(scores[DEFECTIVE])} defective images that the model has not seen.\n")
    rows = false_alarm_rows(scores, options.references, options.rates, options.streams, options.length, options.seed)
    print(markdown(["reference", "stated", "alarms, no defects", "alarms, 5 % defects"], rows), flush=True)
    for images in options.references:
        print(f"\nReference of {images} images: median delay (90 % quantile)\n")
        delays = delay_rows(scores, images, options.turned, options.before, options.after, options.seed)
        header = ["turn", "above the median", "above 90 %", *(f"after {begin} images" for begin in options.before)]
        print(markdown(header, delays), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
