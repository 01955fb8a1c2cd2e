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

from anomalib_metarefine.benchmark.cells import Dirt, LeftOut, Work, curated_images, in_one_line, is_out_of_memory
from anomalib_metarefine.benchmark.engines import ThisProcess, lost_its_process
from anomalib_metarefine.benchmark.machine import peak_mb
from anomalib_metarefine.benchmark.table import Key, ResultTable, Row

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
        for found in _ended(tasks, engine, table):
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


def _ended(waiting: list[_Task], engine: Engine, table: ResultTable) -> Iterator[Row | LeftOut]:
    """Work tasks off in their order, as far as they need not wait for others, and yield what cells find."""
    running: dict[Future, _Task] = {}
    again: list[_Task] = []  # they ran out of memory, and are tried once more when nothing else runs
    alone: set[_Task] = set()
    open_names = {task.name for task in waiting}
    peaks: dict[tuple[object, ...], float] = {}
    given_up: set[Work] = set()

    def start(task: _Task, memory_mb: float | None) -> None:
        call = task.call
        if isinstance(task.name, Key):
            rows = (table.find(replace(task.name, training=training)) for training in _EARLIER[task.name.training])
            call = partial(call, known=[row for row in rows if row is not None and not row.reason])
        running[engine.submit(partial(_measured, call), memory_mb)] = task

    while waiting or running or again:
        ready = (task for task in waiting if not task.needs & open_names)
        for task in list(islice(ready, max(0, engine.slots - len(running)))):
            waiting.remove(task)
            start(task, peaks.get(task.kind))
        if not running:
            alone.add(again[0])
            start(again.pop(0), math.inf)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            error = future.exception()
            if error is not None and task not in alone and (is_out_of_memory(error) or lost_its_process(error)):
                again.append(task)
                continue
            open_names.discard(task.name)
            found = None
            if error is None:
                found, peak = future.result()
                peaks[task.kind] = max(peak, peaks.get(task.kind, 0))
            elif isinstance(task.name, Key):
                found = Row(**asdict(task.name), reason=in_one_line(error))
            if isinstance(found, LeftOut):
                waiting[:] = [other for other in waiting if other.work is not task.work]
                again[:] = [other for other in again if other.work is not task.work]
            if found is not None and task.work not in given_up:
                yield replace(found, jobs=engine.jobs) if isinstance(found, Row) else found
            if isinstance(found, LeftOut):
                given_up.add(task.work)
            if not any(other.work is task.work for other in [*waiting, *again, *running.values()]):
                shutil.rmtree(task.work.folder, ignore_errors=True)


def _measured(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and the most megabytes that its process has had."""
    return call(), peak_mb()
