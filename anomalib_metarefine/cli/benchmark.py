"""Subcommands that measure: models, data sets and contaminations side by side."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import Command, command_line, require

if TYPE_CHECKING:
    import argparse

    from anomalib_metarefine.benchmark.config import BenchConfig
    from anomalib_metarefine.benchmark.engines import Engine
    from anomalib_metarefine.benchmark.table import Row


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", type=Path, help="YAML file; configs/bench/ has some")
    add("--out", type=Path, metavar="CSV", help="result file, gone on with if there; default: results/CONFIG.csv")
    add("--jobs", type=int, default=1, metavar="N", help="cells at a time, in processes of this machine")
    add("--engine", choices=["local", "ray"], default="local", help="ray: cells on the machines of a Ray cluster")
    add("--address", metavar="ADDRESS", help="of the Ray cluster; auto: the one of this machine; default: start one")
    add("--gpus-per-worker", type=float, default=0, metavar="N", help="GPUs of each cell on Ray; may be a part of one")
    add(
        "--root",
        action="append",
        default=[],
        metavar="DATA=DIR",
        help="where a data set lies, if not where CONFIG says",
    )
    add("--models", nargs="+", metavar="NAME", help="only these models of CONFIG")
    add("--data", nargs="+", metavar="NAME", help="only these data sets of CONFIG")
    add("--seeds", nargs="+", type=int, metavar="N", help="these seeds instead of those in CONFIG")
    add("--retry", action="store_true", help="try cells again that could not be run before")


def _bench(options: argparse.Namespace) -> int:
    # Before torch is imported: PatchCore's coreset asks for hundreds of megabytes, hundreds of times, and takes a third
    # of the time with huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    require(options.config, "the YAML file of a benchmark; configs/bench/ has some")
    from anomalib_metarefine.benchmark.config import BenchConfig

    if options.jobs < 1:
        msg = f"--jobs must be at least 1, found {options.jobs}."
        raise ValueError(msg)
    if options.engine != "ray" and (options.address or options.gpus_per_worker):
        msg = "--address and --gpus-per-worker belong to --engine ray."
        raise ValueError(msg)
    config = BenchConfig.read(options.config).select(options.models, options.data, options.seeds)
    return _run(config.at(_roots(options.root)), options)


def _engine(options: argparse.Namespace) -> Engine:
    from anomalib_metarefine.benchmark.engines import Processes, RayCluster, ThisProcess

    if options.engine == "ray":
        return RayCluster(options.address, options.gpus_per_worker)
    return Processes(options.jobs) if options.jobs > 1 else ThisProcess()


def _roots(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (name, equals, folder) in zip(texts, pairs, strict=True):
        if not (name and equals and folder):
            msg = f"--root is written as DATA=DIR, e.g. screw=datasets/MVTecAD, found {text!r}."
            raise ValueError(msg)
    return {name: folder for name, _, folder in pairs}


def _run(config: BenchConfig, options: argparse.Namespace) -> int:
    from rich.console import Console

    from anomalib_metarefine.benchmark.cells import LeftOut
    from anomalib_metarefine.benchmark.grid import plan, run
    from anomalib_metarefine.benchmark.table import ResultTable
    from anomalib_metarefine.benchmark.training import quiet
    from anomalib_metarefine.progress import progress_bars

    quiet()
    out = options.out or Path("results") / f"{options.config.stem}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table = ResultTable(out)
    keys = [key for data in config.data for _, cells in plan(config, data) for _, key in cells]
    rows = [table.find(key) for key in keys]
    done = sum(row is not None and not (options.retry and row.reason) for row in rows)
    print(f"{len(keys)} cells, {done} of them in {out} already.", flush=True)
    left_out = 0
    console = Console(soft_wrap=True)
    with progress_bars(enabled=console.is_terminal) as bars:
        task = bars.add_task("cells", total=len(keys), completed=done)
        for found in run(config, out, _engine(options), options.retry):
            if isinstance(found, LeftOut):
                left_out += 1
                bars.console.print(f"{found.data} left out: {found.reason}", soft_wrap=True, markup=False)
                continue
            bars.console.print(_line(found), soft_wrap=True, markup=False, highlight=False)
            bars.advance(task)
    tables = command_line("metarefine", "bench-report", out, "--out", "DIR")
    print(f"{out}: `{tables}` makes tables of it.")
    if left_out:
        print("metarefine: not every data set could be had; see above.", file=sys.stderr)
    return 1 if left_out else 0


def _line(row: Row) -> str:
    from anomalib_metarefine.benchmark.table import label

    where = label(row.data, row.category)
    cell = f"{row.date[11:19]} {where} {row.contamination:.0%} seed {row.seed} {row.model}, {row.training}"
    if row.reason:
        return f"{cell}: not run. {row.reason}"
    return f"{cell}: image AUROC {row.image_AUROC:.3f}, {row.kept} images, {row.fit_seconds:.1f} s"


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("results", nargs="+", metavar="CSV", type=Path, help="result files of `metarefine bench`")
    add("--out", required=True, type=Path, metavar="DIR", help="made if it does not exist")


def _report(options: argparse.Namespace) -> int:
    for file in options.results:
        require(file, "a result file of `metarefine bench`")
    from anomalib_metarefine.benchmark.report.folder import report
    from anomalib_metarefine.benchmark.table import read_results

    written = report(read_results(*options.results), options.out)
    print(f"{len(written)} files; begin with {options.out / 'README.md'}")
    return 0


BENCHMARK = {
    "bench": Command(
        "models, data sets and contaminations side by side, in one result file",
        "Train and test every model of a configuration on every data set, from clean to as dirty as it says: on "
        "everything, on what curation keeps, on the truly clean part. Finished cells are in the result file and "
        "are not repeated: interrupt it whenever you like, and start it again.",
        _bench_arguments,
        _bench,
    ),
    "bench-report": Command(
        "tables of result files",
        "Write tables in Markdown of what `metarefine bench` measured.",
        _report_arguments,
        _report,
    ),
}
