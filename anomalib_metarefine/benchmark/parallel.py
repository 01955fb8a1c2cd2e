"""The data sets of a benchmark, one after another or in several processes."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from queue import Empty
from typing import TYPE_CHECKING

from anomalib_metarefine.benchmark.grid import curated_images, run_data_set
from anomalib_metarefine.benchmark.table import ResultTable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.synchronize import Event
    from pathlib import Path

    from anomalib_metarefine.benchmark.config import BenchConfig
    from anomalib_metarefine.benchmark.data_sets import DataSet
    from anomalib_metarefine.benchmark.grid import Curator, LeftOut
    from anomalib_metarefine.benchmark.table import Row


def run(
    config: BenchConfig, path: Path, jobs: int = 1, retry: bool = False, curator: Curator = curated_images
) -> Iterator[Row | LeftOut]:
    """Every cell that is not in the result file yet.

    Args:
        config (BenchConfig): The grid.
        path (Path): The result file; its folder must exist.
        jobs (int): Processes, of a data set each.
        retry (bool): Try cells again that could not be run before.
        curator (Curator): Stands behind `curated_images`.

    Yields:
        Row | LeftOut: Every new row once it is in the file; or a data set that can't be had, and why.
    """
    jobs = min(jobs, len(config.data))
    if jobs < 2:
        table = ResultTable(path)
        for data in config.data:
            yield from run_data_set(config, data, table, 1, retry, curator)
        return
    ResultTable(path)  # once, before many open it
    context = multiprocessing.get_context("spawn")  # forked processes inherit torch's threads, and hang
    queue, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(jobs, context, _start_worker, (queue, stop, jobs)) as pool:
        futures = [pool.submit(_work, config, data, path, jobs, retry, curator) for data in config.data]
        unfinished = len(futures)
        try:
            while unfinished:
                try:
                    found = queue.get(timeout=1)
                except Empty:
                    for future in futures:
                        if future.done():
                            future.result()  # raises what stopped a worker
                    continue
                if found is None:
                    unfinished -= 1
                else:
                    yield found
        finally:
            stop.set()  # after the cells that they are at
            pool.shutdown(wait=False, cancel_futures=True)


_queue: multiprocessing.Queue | None = None  # of a worker
_stop: Event | None = None


def _start_worker(queue: multiprocessing.Queue, stop: Event, jobs: int) -> None:
    global _queue, _stop  # the one way to hand them to the workers of a pool
    import torch

    from anomalib_metarefine.benchmark.training import hush

    _queue, _stop = queue, stop
    hush()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _work(config: BenchConfig, data: DataSet, path: Path, jobs: int, retry: bool, curator: Curator) -> None:
    for found in run_data_set(config, data, ResultTable(path), jobs, retry, curator):
        _queue.put(found)
        # Not to go on when the command was killed, and perhaps started again.
        if _stop.is_set() or not multiprocessing.parent_process().is_alive():
            return
    _queue.put(None)
