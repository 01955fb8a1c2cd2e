"""What the processes of a benchmark do: features of a data set, curation of a training set, one cell.

Each is a function of plain arguments and of files in the work folder, so that any process can run it. A process holds
the training set and the features that it had last.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from anomalib_metarefine.benchmark.table import Key, Row, label
from anomalib_metarefine.benchmark.training_sets import TooFewError, TrainingSet, curated_images, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import pandas as pd

    from anomalib_metarefine.benchmark.config import BenchConfig, Entry
    from anomalib_metarefine.benchmark.data_sets import DataSet
    from anomalib_metarefine.benchmark.memo import Memo
    from anomalib_metarefine.benchmark.models import ModelSpec
    from anomalib_metarefine.benchmark.training_sets import Curated, Dirt

    Curator = Callable[[Sequence[str], int, DataSet, BenchConfig, Path], Curated]

_T = TypeVar("_T")

_UNWRITTEN_MB = 256  # of images and features that a process holds beside the files that it shares


class LeftOut(NamedTuple):
    """A data set that can't be had, and why."""

    data: str
    reason: str


@dataclass(frozen=True, eq=False)
class Work:
    """One data set of a benchmark, and what its cells share."""

    config: BenchConfig
    data: DataSet
    folder: Path  # of this data set; every process must see it
    curator: Curator = curated_images
    shared: bool = False  # whether features are files that several processes read, or held by the only one

    @property
    def label(self) -> str:
        """How messages name the data set."""
        return label(self.data.name, self.data.category)

    def embed(self, dirts: Iterable[Dirt], specs: Iterable[ModelSpec]) -> LeftOut | None:
        """Read and embed the images of some training sets and their test sets, for the models named."""
        import pandas as pd

        from anomalib_metarefine.benchmark.memo import Memo
        from anomalib_metarefine.benchmark.training import embed

        tables = []
        for dirt in dirts:
            try:
                found = self._training_set(dirt)
            except TooFewError:  # its cells say so
                continue
            except Exception as error:  # a download, a folder, a third party's datamodule
                _raise_if_out_of_memory(error)
                return LeftOut(self.label, in_one_line(error))
            tables += [found.train, found.test]
        if tables:
            samples = pd.concat(tables).drop_duplicates(["image_path", "label_index"])
            memo = Memo(_UNWRITTEN_MB, self.folder / "features", writes=True)
            embed(samples, specs, self.config, self.data.image_size, memo)
            memo.write()
        return None

    def curate(self, dirt: Dirt) -> None:
        """Have a training set curated, before several cells ask for it at once."""
        try:
            _ = self._training_set(dirt).curated
        except Exception as error:  # the cells meet it again, and it goes into their rows
            _raise_if_out_of_memory(error)

    def cell(self, dirt: Dirt, entry: Entry, key: Key, known: Sequence[Row]) -> Row | LeftOut:
        """Train and test one model; or copy the row of a training that was on the same images.

        Args:
            dirt (Dirt): The training set.
            entry (Entry): The model.
            key (Key): What the row is found by.
            known (Sequence[Row]): Rows of other trainings of this model on this training set.

        Raises:
            MemoryError: If there is not enough.
        """
        from anomalib_metarefine.benchmark.machine import machine
        from anomalib_metarefine.features.gather import versions

        row = Row(
            **asdict(key),
            versions=", ".join(f"{name} {version}" for name, version in versions().items()),
            machine=machine(),
        )
        try:
            training_set = self._training_set(dirt)
        except TooFewError as error:
            row = replace(row, reason=str(error))
        except Exception as error:  # a download, a folder, a third party's datamodule
            _raise_if_out_of_memory(error)
            return LeftOut(self.label, in_one_line(error))
        else:
            try:
                row = self._row(row, training_set, entry, known)
            except Exception as error:  # whatever a model can't do here goes into its row
                _raise_if_out_of_memory(error)
                row = replace(row, **_size(training_set.test), reason=in_one_line(error))
        return replace(row, date=datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def _row(self, row: Row, training_set: TrainingSet, entry: Entry, known: Sequence[Row]) -> Row:
        from anomalib_metarefine.benchmark.training import train_and_test

        config, dirty, test = self.config, training_set.dirty, training_set.test
        samples, kept = training_set.select(row.training)
        seconds = training_set.curation_seconds if row.training in ("curated", "repaired") else float("nan")
        for other in known:
            images, used = training_set.select(other.training)
            if samples.image_path[kept].equals(images.image_path[used]):
                return replace(other, training=row.training, curation_seconds=round(seconds, 1))
        figures, rejected = train_and_test(
            entry.spec,
            config.backbone,
            config.layers,
            samples[kept],
            test,
            self.data.image_size,
            row.seed,
            self._memo(),
        )
        left_out = ~kept | samples.image_path.astype(str).isin(rejected or []).to_numpy()
        return replace(
            row,
            **{name: round(value, 5) for name, value in figures.items()},
            **_size(test),
            curation_seconds=round(seconds, 1),
            kept=int((~left_out).sum()),
            rejected=int(left_out.sum()),
            precision=float(dirty[left_out].mean()) if left_out.any() else float("nan"),
            recall=float(left_out[dirty].mean()) if dirty.any() else float("nan"),
        )

    def _training_set(self, dirt: Dirt) -> TrainingSet:
        def curate(paths: list[str], folder: Path) -> Curated:
            return self.curator(paths, dirt.seed, self.data, self.config, folder)

        name = hashlib.sha256(repr(dirt).encode()).hexdigest()[:16]
        return _hold(TrainingSet, self.folder / name, lambda folder: draw(self.data, dirt, folder, curate))

    def _memo(self) -> Memo:
        from anomalib_metarefine.benchmark.memo import Memo

        return _hold(
            Memo, self.folder / "features", lambda folder: Memo(_UNWRITTEN_MB, folder) if self.shared else Memo()
        )


_held: dict[type, tuple[Path, object]] = {}


def _hold(kind: type[_T], folder: Path, make: Callable[[Path], _T]) -> _T:
    """What this process made last of a kind, if it belongs to the same folder."""
    if kind not in _held or _held[kind][0] != folder:
        _held.pop(kind, None)  # first: there may not be room for both
        _held[kind] = (folder, make(folder))
    return _held[kind][1]


def release() -> None:
    """Hold nothing any more."""
    _held.clear()


def _size(test: pd.DataFrame) -> dict[str, int]:
    return {"test_normal": int((test.label_index == 0).sum()), "test_abnormal": int((test.label_index == 1).sum())}


def _raise_if_out_of_memory(error: Exception) -> None:
    """Raise a MemoryError where there was not enough; PyTorch has no class of its own for that off a GPU."""
    if isinstance(error, MemoryError):
        raise error
    text = str(error).lower()
    if "out of memory" in text or "can't allocate memory" in text:
        raise MemoryError(in_one_line(error)) from error


def in_one_line(error: BaseException) -> str:
    """Kind and message of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
