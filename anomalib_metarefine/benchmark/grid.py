"""The cells of a benchmark, run one after another, and picked up where they were left.

A cell is one model, trained on one training set and tested. The cells of a data set run in one process, so that its
images are read and embedded once.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from joblib import Parallel, delayed

from anomalib_metarefine.benchmark.table import Key, ResultTable, Row, label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd
    from anomalib.data import AnomalibDataModule

    from anomalib_metarefine.benchmark.config import BenchConfig, Entry
    from anomalib_metarefine.benchmark.data_sets import DataSet
    from anomalib_metarefine.benchmark.memo import Memo

    Curator = Callable[[Sequence[str], int, DataSet, BenchConfig, Path], "Curated"]

_LEAST_DEFECTIVE = 10  # in the test set: with fewer, AUROC says nothing


class LeftOut(NamedTuple):
    """A data set that can't be had, and why."""

    data: str
    reason: str


@dataclass(frozen=True)
class Dirt:
    """How a training set is made dirty; see `Contaminated`."""

    protocol: str
    overlap: str
    contamination: float
    seed: int


class Curated(NamedTuple):
    """What our curation makes of N training images."""

    kept: np.ndarray  # [N] of bool, false for the rejected
    repaired: list[str]  # for each image, the one without its unusual regions; where it has none, itself


@dataclass
class TrainingSet:
    """One contaminated training set, its test set, and its curation, which is run when it is first asked for."""

    data: DataSet
    config: BenchConfig
    seed: int
    datamodule: AnomalibDataModule
    dirty: np.ndarray  # [N] of bool
    curator: Curator
    folder: Path  # for repaired images, and nothing else
    curation_seconds: float = float("nan")
    _curated: Curated | None = field(default=None, repr=False)

    @property
    def train(self) -> pd.DataFrame:
        """Samples of the training set."""
        return self.datamodule.train_data.samples

    @property
    def test(self) -> pd.DataFrame:
        """Samples of the test set."""
        return self.datamodule.test_data.samples

    @property
    def curated(self) -> Curated:
        """What the curation makes of it."""
        if self._curated is None:
            begin = time.perf_counter()
            paths = self.train.image_path.astype(str).tolist()
            self._curated = self.curator(paths, self.seed, self.data, self.config, self.folder)
            self.curation_seconds = time.perf_counter() - begin
        return self._curated

    def select(self, training: str) -> tuple[pd.DataFrame, np.ndarray]:
        """What a training is on: samples of all ``N`` images as they are then, and an ``[N]`` mask of those used."""
        if training == "raw":
            return self.train, np.ones(len(self.train), dtype=bool)
        if training == "clean":
            return self.train, ~self.dirty
        if training == "repaired":
            return self.train.assign(image_path=self.curated.repaired), self.curated.kept
        return self.train, self.curated.kept


def curated_images(paths: Sequence[str], seed: int, data: DataSet, config: BenchConfig, folder: Path) -> Curated:
    """What `curate` makes of training images; those to review pass, since nobody has reviewed them."""
    from anomalib_metarefine.curation.apply import apply
    from anomalib_metarefine.curation.curate import curate

    manifest, evidence = curate(
        list(paths),
        backbone=config.backbone,
        layers=config.layers,
        image_size=data.image_size,
        seed=seed,
        quality=False,  # it looks for other things than defects and rejects nothing
        progress=False,
    )
    rejected = {path.resolve() for path in manifest.rejected}
    copies = {}
    if evidence.unusual_in:
        apply(manifest, folder, "repair", review="keep", evidence=evidence)
        copies = {(manifest.root / name).resolve(): str(folder / "keep" / name) for name in evidence.unusual_in}
    return Curated(
        np.array([Path(path).resolve() not in rejected for path in paths]),
        [copies.get(Path(path).resolve(), path) for path in paths],
    )


def plan(config: BenchConfig, data: DataSet) -> Iterator[tuple[Dirt, list[tuple[Entry, Key]]]]:
    """The training sets of a data set, each with the models and keys of its cells.

    Seeds come first, so that an interrupted benchmark has whole tables of fewer seeds. A clean training set is the same
    for every protocol, and is there once.
    """
    shares = sorted({share for entry in config.models for share in entry.contamination})
    size = "x".join(map(str, data.image_size))
    ways = list(product(config.protocols, config.overlaps))
    for seed, share, way in product(config.seeds, shares, ways):
        if share == 0 and way != ways[0]:
            continue
        common = (data.name, data.category, size, data.train_images or 0, config.backbone, *way, share, seed)
        cells = [
            (entry, Key(*common, entry.spec.name, entry.spec.settings, training))
            for entry in config.models
            if share in entry.contamination
            for training in entry.trainings
        ]
        yield Dirt(*way, share, seed), cells


def run(
    config: BenchConfig, path: Path, jobs: int = 1, retry: bool = False, curator: Curator = curated_images
) -> Iterator[Row | LeftOut]:
    """Every cell that is not in the result file yet.

    Args:
        config (BenchConfig): The grid.
        path (Path): The result file; its folder must exist.
        jobs (int): Processes, of a data set each.
        retry (bool): Try cells again that could not be run before.
        curator (Curator): What curates training sets.

    Yields:
        Row | LeftOut: Every new row once it is in the file, with several processes once its data set is done; or a data
            set that can't be had, and why.
    """
    table = ResultTable(path)  # once, before many open it
    jobs = min(jobs, len(config.data))
    if jobs < 2:
        for data in config.data:
            yield from run_data_set(config, data, table, 1, retry, curator)
        return
    work = (delayed(_all_cells)(config, data, path, jobs, retry, curator) for data in config.data)
    for rows in Parallel(jobs, return_as="generator_unordered")(work):
        yield from rows


def _all_cells(
    config: BenchConfig, data: DataSet, path: Path, jobs: int, retry: bool, curator: Curator
) -> list[Row | LeftOut]:
    from anomalib_metarefine.benchmark.training import quiet

    quiet()
    return list(run_data_set(config, data, ResultTable(path), jobs, retry, curator))


def run_data_set(
    config: BenchConfig,
    data: DataSet,
    table: ResultTable,
    jobs: int = 1,
    retry: bool = False,
    curator: Curator = curated_images,
) -> Iterator[Row | LeftOut]:
    """Every cell of one data set that is not in the table yet, see `run`; ``jobs`` is for the table only."""
    from anomalib_metarefine.benchmark.memo import Memo

    def is_missing(key: Key) -> bool:
        row = table.find(key)
        return row is None or (retry and row.reason != "")

    memo = Memo()
    for dirt, cells in plan(config, data):
        missing = [(entry, key) for entry, key in cells if is_missing(key)]
        if not missing:
            continue
        with tempfile.TemporaryDirectory(prefix="metarefine-bench-") as folder:
            try:
                training_set = _draw(config, data, dirt, curator, Path(folder))
            except _TooFewError as error:
                for _, key in missing:
                    yield _append(table, Row(**asdict(key), reason=str(error)), jobs)
                continue
            except Exception as error:  # a download, a folder, a third party's datamodule
                yield LeftOut(label(data.name, data.category), _in_one_line(error))
                return
            for entry, key in missing:
                yield _append(table, _cell(table, training_set, entry, key, memo), jobs)


class _TooFewError(ValueError):
    """A contamination that a data set has not enough images for."""


def _draw(config: BenchConfig, data: DataSet, dirt: Dirt, curator: Curator, folder: Path) -> TrainingSet:
    from anomalib_metarefine.data.contamination import Contaminated

    source = data.datamodule(dirt.seed)
    source.prepare_data()
    source.setup()
    datamodule = Contaminated(source, dirt.contamination, dirt.overlap, dirt.seed, data.train_images, dirt.protocol)
    try:
        datamodule.setup()
    except ValueError as error:
        raise _TooFewError(*error.args) from error
    found = TrainingSet(data, config, dirt.seed, datamodule, datamodule.is_injected.to_numpy(), curator, folder)
    defective = int(found.test.label_index.sum())
    if defective < _LEAST_DEFECTIVE:
        msg = (
            f"With contamination {dirt.contamination:g}, {defective} defective images are left to test on, and "
            f"{_LEAST_DEFECTIVE} are needed. Ask for fewer training images."
        )
        raise _TooFewError(msg)
    return found


def _cell(table: ResultTable, training_set: TrainingSet, entry: Entry, key: Key, memo: Memo) -> Row:
    """Train and test one model; or copy the row of a training that was on the same images."""
    from anomalib_metarefine.benchmark.training import train_and_test

    data, dirty, test = training_set.data, training_set.dirty, training_set.test
    row = Row(
        **asdict(key),
        test_normal=int((test.label_index == 0).sum()),
        test_abnormal=int((test.label_index == 1).sum()),
    )
    try:
        samples, kept = training_set.select(key.training)
        seconds = training_set.curation_seconds if key.training in ("curated", "repaired") else float("nan")
        # Which trainings may have been on the same images, and can be asked without a curation that is not needed yet.
        for training in {"raw": [], "repaired": ["raw", "curated"]}.get(key.training, ["raw"]):
            known = table.find(replace(key, training=training))
            if known is not None and not known.reason:
                images, used = training_set.select(training)
                if samples.image_path[kept].equals(images.image_path[used]):
                    return replace(known, training=key.training, curation_seconds=seconds)
        config = training_set.config
        figures, rejected = train_and_test(
            entry.spec, config.backbone, config.layers, samples[kept], test, data.image_size, key.seed, memo
        )
    except Exception as error:  # whatever a model can't do here goes into its row
        return replace(row, reason=_in_one_line(error))
    left_out = ~kept | samples.image_path.astype(str).isin(rejected or []).to_numpy()
    return replace(
        row,
        **{name: round(value, 5) for name, value in figures.items()},
        curation_seconds=round(seconds, 1),
        kept=int((~left_out).sum()),
        rejected=int(left_out.sum()),
        precision=float(dirty[left_out].mean()) if left_out.any() else float("nan"),
        recall=float(left_out[dirty].mean()) if dirty.any() else float("nan"),
    )


def _append(table: ResultTable, row: Row, jobs: int) -> Row:
    from anomalib_metarefine.benchmark.machine import machine
    from anomalib_metarefine.features.gather import versions

    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    row = replace(row, versions=used, machine=machine(), jobs=jobs, date=date)
    table.append(row)
    return row


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
