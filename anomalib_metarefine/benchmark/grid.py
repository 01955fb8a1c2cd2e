"""The cells of a benchmark, run where an engine runs them, and picked up where they were left.

A cell is one model, trained on one training set and tested. This process alone writes the result file.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_metarefine.benchmark.cells import LeftOut, Work, in_one_line
from anomalib_metarefine.benchmark.engines import ThisProcess, lost_its_process
from anomalib_metarefine.benchmark.machine import peak_mb
from anomalib_metarefine.benchmark.table import Key, ResultTable, Row
from anomalib_metarefine.benchmark.training_sets import Dirt, curated_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anomalib_metarefine.benchmark.cells import Curator
    from anomalib_metarefine.benchmark.config import BenchConfig, Entry
    from anomalib_metarefine.benchmark.data_sets import DataSet
    from anomalib_metarefine.benchmark.engines import Engine

# Trainings that may have been on the same images, and can be asked without a curation that is not needed yet.
_EARLIER = {"raw": (), "curated": ("raw",), "repaired": ("raw", "curated"), "clean": ("raw",)}


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


@dataclass(eq=False)
class _Task:
    """What one process does at a time."""

    work: Work
    name: object  # the key of a cell, the dirt of a curation, or the work whose features are made
    call: Callable[..., Any]
    needs: frozenset = frozenset()  # names of tasks that must have ended before
    model: str = ""

    @property
    def kind(self) -> tuple[object, ...]:
        """Tasks of a kind need about the same memory."""
        return self.work, type(self.name), self.model


def run(
    config: BenchConfig,
    path: Path,
    engine: Engine | None = None,
    retry: bool = False,
    curator: Curator = curated_images,
) -> Iterator[Row | LeftOut]:
    """Every cell that is not in the result file yet.

    Args:
        config (BenchConfig): The grid.
        path (Path): The result file; its folder must exist. A work folder beside it, which all processes of the engine
            must see, is removed in the end.
        engine (Engine | None): Where cells are run; closed in the end. ``None`` takes this process.
        retry (bool): Try cells again that could not be run before.
        curator (Curator): What curates training sets.

    Yields:
        Row | LeftOut: Every new row once it is in the file; or a data set that can't be had, and why.
    """
    engine = engine or ThisProcess()
    table = ResultTable(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent)).absolute()
    try:
        tasks = []
        for number, data in enumerate(config.data):
            work = Work(config, data, folder / str(number), curator, shared=engine.slots > 1)
            tasks += _tasks(work, table, retry)
        for found in _Schedule(tasks, engine, table):
            if isinstance(found, Row):
                table.append(found)
            yield found
    finally:
        engine.close()
        shutil.rmtree(folder, ignore_errors=True)


def _tasks(work: Work, table: ResultTable, retry: bool) -> list[_Task]:
    """Of one data set: features and curations first where several processes share them, then its cells."""
    first, cells, dirts, specs = [], [], [], {}
    for dirt, planned in plan(work.config, work.data):
        rows = {key: table.find(key) for _, key in planned}
        missing = [(entry, key) for entry, key in planned if rows[key] is None or (retry and rows[key].reason)]
        if not missing:
            continue
        dirts.append(dirt)
        if work.shared and any(key.training in ("curated", "repaired") for _, key in missing):
            first.append(_Task(work, (work, dirt), partial(work.curate, dirt), frozenset([work])))
        for entry, key in missing:
            specs[entry.spec.name] = entry.spec
            before = {replace(key, training=training) for training in _EARLIER[key.training]}
            curation = {(work, dirt)} if key.training in ("curated", "repaired") else set()
            call = partial(work.cell, dirt, entry, key)
            cells.append(_Task(work, key, call, frozenset({work} | curation | before), key.model))
    if work.shared and cells:
        first.insert(0, _Task(work, work, partial(work.embed, dirts, list(specs.values()))))
    return first + cells


class _Schedule:
    """Tasks in their order, as far as they need not wait for others."""

    def __init__(self, tasks: list[_Task], engine: Engine, table: ResultTable) -> None:
        self._waiting, self._engine, self._table = tasks, engine, table
        self._running: dict[Future, _Task] = {}
        self._again: list[_Task] = []  # they ran out of memory, and are tried once more when nothing else runs
        self._tried_alone: set[_Task] = set()
        self._open = {task.name for task in tasks}
        self._peaks: dict[tuple[object, ...], float] = {}

    def __iter__(self) -> Iterator[Row | LeftOut]:
        while self._waiting or self._running or self._again:
            ready = (task for task in self._waiting if not task.needs & self._open)
            for task in list(islice(ready, max(0, self._engine.slots - len(self._running)))):
                self._waiting.remove(task)
                self._start(task, self._peaks.get(task.kind))
            if not self._running:
                self._tried_alone.add(self._again[0])
                self._start(self._again.pop(0), math.inf)
            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                if (task := self._running.pop(future, None)) is not None:
                    yield from self._found(task, future)

    def _start(self, task: _Task, memory_mb: float | None) -> None:
        call = task.call
        if isinstance(task.name, Key):
            rows = (self._table.find(replace(task.name, training=other)) for other in _EARLIER[task.name.training])
            call = partial(call, known=[row for row in rows if row is not None and not row.reason])
        self._running[self._engine.submit(partial(_measured, call), memory_mb)] = task

    def _found(self, task: _Task, future: Future) -> Iterator[Row | LeftOut]:
        error = future.exception()
        ran_out = isinstance(error, MemoryError) or (error is not None and lost_its_process(error))
        if ran_out and task not in self._tried_alone:
            self._again.append(task)
            return
        self._open.discard(task.name)
        found: Row | LeftOut | None = None
        if error is None:
            found, peak = future.result()
            self._peaks[task.kind] = max(peak, self._peaks.get(task.kind, 0))
        elif isinstance(task.name, Key):  # the cells that needed any other task meet its error again
            found = Row(**asdict(task.name), reason=in_one_line(error))
        if isinstance(found, LeftOut):
            self._give_up(task.work)
            yield found
        elif found is not None:
            yield replace(found, jobs=self._engine.jobs)
        if not any(other.work is task.work for other in [*self._waiting, *self._again, *self._running.values()]):
            shutil.rmtree(task.work.folder, ignore_errors=True)

    def _give_up(self, work: Work) -> None:
        """Wait for nothing of a data set that can't be had."""
        self._waiting = [task for task in self._waiting if task.work is not work]
        self._again = [task for task in self._again if task.work is not work]
        self._running = {future: task for future, task in self._running.items() if task.work is not work}


def _measured(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and the most megabytes that its process has had."""
    return call(), peak_mb()
