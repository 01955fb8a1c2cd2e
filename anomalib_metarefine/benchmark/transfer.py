"""What curation does for other models: anomalib's own, trained raw, curated and on the truly clean images.

    python -m anomalib_metarefine.benchmark.transfer --out transfer.csv --data elpv-mono elpv-poly
    python -m anomalib_metarefine.benchmark.transfer --out transfer.csv --summary

Real defective images replace a share of a training set and leave the test set. The training images are curated once,
and every model is trained three times with anomalib's Engine, with one seed, and tested on one test set: on everything
(raw), on what curation did not reject (curated), on the truly clean part (clean). Finished trainings are in the table
and are not repeated, so the command may be interrupted and started again. Processes with different data sets may share
a table.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anomalib_metarefine.benchmark.summary import markdown
from anomalib_metarefine.benchmark.table import ResultTable, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd

    from anomalib_metarefine.benchmark.data_sets import DataSet
    from anomalib_metarefine.benchmark.memo import Memo

    Curator = Callable[[Sequence[str], int, tuple[int, int]], np.ndarray]

TRAININGS = ("raw", "curated", "clean")
_MODELS = ["Padim", "Patchcore", "Dfm", "Fastflow"]
_LEAST_DEFECTIVE = 10  # in the test set: with fewer, AUROC says nothing


def curated_mask(paths: Sequence[str], seed: int, image_size: tuple[int, int]) -> np.ndarray:
    """Which training images our curation lets pass.

    Args:
        paths (Sequence[str]): The N training images.
        seed (int): Seed of the curation.
        image_size (tuple[int, int]): Height and width.

    Returns:
        np.ndarray: ``[N]`` of bool, false for the rejected. Images to review pass: nobody has reviewed them.
    """
    from anomalib_metarefine.curation.curate import curate

    # The quality check looks for other things than defects and rejects nothing.
    manifest = curate(list(paths), image_size=image_size, seed=seed, quality=False, progress=False).manifest
    rejected = {Path(path).resolve() for path in manifest.rejected}
    return np.array([Path(path).resolve() not in rejected for path in paths])


@dataclass
class Cell:
    """One contaminated training set, its test set, and its curation, which is run when it is first asked for.

    Attributes:
        data (DataSet): Where the images come from.
        contamination (float): Share of dirty training images.
        seed (int): Of everything.
        train (pd.DataFrame): Samples of the training set.
        test (pd.DataFrame): Samples of the test set.
        dirty (np.ndarray): ``[N]`` of bool, true for the dirty training images.
        curator (Curator): Stands behind `curated_mask`.
    """

    data: DataSet
    contamination: float
    seed: int
    train: pd.DataFrame
    test: pd.DataFrame
    dirty: np.ndarray
    curator: Curator
    _curated: np.ndarray | None = None
    curation_seconds: float = float("nan")

    @classmethod
    def draw(cls, data: DataSet, contamination: float, seed: int, curator: Curator) -> Cell:
        """Contaminate the training set.

        Raises:
            ValueError: If there are too few images for that, or too few defective ones would be left to test on.
        """
        from anomalib_metarefine.data.contamination import Contaminated

        datamodule = Contaminated(data.datamodule(seed), contamination, "no-overlap", seed, data.train_images)
        datamodule.setup()
        train, test = datamodule.train_data.samples, datamodule.test_data.samples
        defective = int(test.label_index.sum())
        if defective < _LEAST_DEFECTIVE:
            msg = (
                f"With contamination {contamination:g}, {data.name} has {defective} defective images left to test on, "
                f"and needs {_LEAST_DEFECTIVE}. Ask for fewer training images."
            )
            raise ValueError(msg)
        return cls(data, contamination, seed, train, test, datamodule.is_injected.to_numpy(), curator)

    def kept(self, training: str) -> np.ndarray:
        """``[N]`` of bool: the images that a training is on."""
        if training == "raw":
            return np.ones(len(self.train), dtype=bool)
        if training == "clean":
            return ~self.dirty
        if self._curated is None:
            begin = time.perf_counter()
            self._curated = self.curator(self.train.image_path.astype(str).tolist(), self.seed, self.data.image_size)
            self.curation_seconds = time.perf_counter() - begin
        return self._curated

    def key(self, model: str, settings: str, training: str) -> dict[str, object]:
        """What a row of this cell is found by."""
        return {
            "data": self.data.name,
            "image_size": "x".join(map(str, self.data.image_size)),
            "train_images": len(self.train),
            "contamination": self.contamination,
            "seed": self.seed,
            "model": model,
            "settings": settings,
            "training": training,
        }


def run(
    table: ResultTable,
    data: Sequence[DataSet],
    contaminations: Sequence[float],
    seeds: Sequence[int],
    models: Sequence[str],
    curator: Curator = curated_mask,
) -> Iterator[Row | str]:
    """Everything that is not in the table yet.

    Args:
        table (ResultTable): Where finished trainings are and new ones go.
        data (Sequence[DataSet]): Data sets.
        contaminations (Sequence[float]): Shares of dirty training images, in [0, 1).
        seeds (Sequence[int]): One of everything for each.
        models (Sequence[str]): Keys of `others.RECIPES`.
        curator (Curator): Stands behind `curated_mask`.

    Yields:
        Row | str: Every new row once it is in the table, or why a training set can't be had.
    """
    from anomalib_metarefine.benchmark.memo import Memo

    for data_set in data:
        memo = Memo()  # its images are of no use to the next data set
        for seed in seeds:
            for contamination in contaminations:
                try:
                    cell = Cell.draw(data_set, contamination, seed, curator)
                except ValueError as error:
                    yield f"{data_set.name}, contamination {contamination:g}, seed {seed} left out: {error}"
                    continue
                for model in models:
                    yield from _train(table, cell, model, memo)


def _train(table: ResultTable, cell: Cell, model: str, memo: Memo) -> Iterator[Row]:
    """The three trainings of one model, as far as they are missing."""
    from anomalib_metarefine.benchmark.others import RECIPES
    from anomalib_metarefine.benchmark.training import train_and_test

    settings = RECIPES[model].settings
    for training in TRAININGS:
        key = cell.key(model, settings, training)
        if table.find(key) is not None:
            continue
        kept = cell.kept(training)
        if training != "raw" and kept.all():
            raw = table.find(cell.key(model, settings, "raw"))  # the same images and seed: the same model
            auroc, seconds = float(raw.image_AUROC), float(raw.seconds)
        else:
            auroc, seconds = train_and_test(model, cell.train[kept], cell.test, cell.data.image_size, cell.seed, memo)
        row = Row(
            **key,
            image_AUROC=round(auroc, 5),
            kept=int(kept.sum()),
            rejected=int((~kept).sum()),
            precision=float(cell.dirty[~kept].mean()) if not kept.all() else float("nan"),
            recall=float((~kept)[cell.dirty].mean()) if cell.dirty.any() else float("nan"),
            seconds=round(seconds, 2),
            curation_seconds=round(cell.curation_seconds, 1) if training == "curated" else float("nan"),
            test_normal=int((cell.test.label_index == 0).sum()),
            test_abnormal=int((cell.test.label_index == 1).sum()),
            versions=_versions(),
        )
        table.append(row)
        yield row


def _versions() -> str:
    from importlib.metadata import version

    names = ("anomalib-metarefine", "anomalib", "torch")
    return ", ".join([*(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}"])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_metarefine.benchmark.transfer",
        description="What curation does for anomalib's own models: raw, curated and truly clean training side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the table; what it holds already is not run again")
    parser.add_argument(
        "--data",
        nargs="+",
        default=["elpv-mono", "elpv-poly"],
        metavar="WHERE[@HxW][:TRAIN_IMAGES][:NAME]",
        help="elpv-mono, elpv-poly, or a category folder in MVTec layout; images are resized to 256x256 if not told",
    )
    parser.add_argument("--contamination", type=float, nargs="+", default=[0.0, 0.2, 0.4], help="dirty shares")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one of everything for each")
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=_MODELS, help="what to train")
    parser.add_argument("--summary", action="store_true", help="train nothing, print what is in --out as Markdown")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used.
    """
    arguments = build_parser().parse_args(argv)
    # Before torch is imported: PatchCore's coreset asks for hundreds of megabytes, hundreds of times, and takes a third
    # of the time with huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        if arguments.summary:
            if not arguments.out.is_file():
                msg = f"There is no table {arguments.out} to sum up. Run the command without --summary first."
                raise FileNotFoundError(msg)
            print(markdown(ResultTable(arguments.out).read()))
            return 0
        from anomalib_metarefine.benchmark.data_sets import DataSet
        from anomalib_metarefine.benchmark.training import hush

        hush()
        data = [DataSet.parse(spec) for spec in arguments.data]
        names = [data_set.name for data_set in data]
        if len(set(names)) < len(names):
            msg = f"Data sets need different names, found {names}. Add :NAME to the ones that agree."
            raise ValueError(msg)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        table = ResultTable(arguments.out)
        for row in run(table, data, arguments.contamination, arguments.seeds, arguments.models):
            print(row if isinstance(row, str) else _progress(row), flush=True)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"transfer: {error}", file=sys.stderr)
        return 2
    return 0


def _progress(row: Row) -> str:
    return (
        f"{time.strftime('%H:%M:%S')} {row.data} {row.contamination:g} seed {row.seed} {row.model} {row.training}: "
        f"image AUROC {row.image_AUROC:.3f}, {row.kept} images, {row.seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
