"""Where passes run: in this process, in processes of this machine, or in actors of a Ray cluster.

A pass is a plain function ``pass(item, shared, ...)`` that can be pickled and keeps nothing in memory from call to
call: `features.store` calls it for every shard of the images. Results come back in the order of the items, so they do
not depend on who computed them, nor when.
"""

from __future__ import annotations

import pickle
import tempfile
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

    Pass = Callable[..., Any]
    Call = tuple[Any, ...]  # an item, and what a pass gets about this one only
    OnImages = Callable[[int], None]

Engine = Literal["local", "joblib", "ray"]

_AHEAD = 2  # calls waiting for each worker
_STORE = 500_000_000  # bytes for what Ray hands round: features are in files
_ATTEMPTS = 5  # of a call whose worker died
_told: ContextVar[OnImages] = ContextVar("told")


def advance(images: int) -> None:
    """Called inside a pass that takes long: so many more images are done."""
    _told.get(lambda _images: None)(images)


class Executor(Protocol):
    """Runs a pass on many items."""

    @property
    def shares_memory(self) -> bool:
        """Whether passes see the objects that they are given, and not copies of them."""
        ...

    def map(self, function: Pass, calls: Iterable[Call], shared: object, on_images: OnImages) -> Iterator[Any]:
        """Results of ``function(call[0], shared, *call[1:])``, in order.

        Args:
            function (Pass): The pass.
            calls (Iterable[Call]): Small; what is large lies in files.
            shared (object): What all calls get; sent to each worker once.
            on_images (OnImages): Told what the pass tells `advance`.
        """
        ...


class InProcess:
    """One call after the other, here."""

    shares_memory = True

    def map(self, function: Pass, calls: Iterable[Call], shared: object, on_images: OnImages) -> Iterator[Any]:
        """See `Executor.map`."""
        for item, *rest in calls:
            token = _told.set(on_images)
            try:
                result = function(item, shared, *rest)
            finally:
                _told.reset(token)
            yield result


class Processes:
    """Processes of this machine, by joblib.

    Args:
        workers (int): How many.
    """

    shares_memory = False

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def map(self, function: Pass, calls: Iterable[Call], shared: object, on_images: OnImages) -> Iterator[Any]:
        """See `Executor.map`; calls of a worker that dies are made again."""
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        waiting, attempts = list(calls), 0
        with tempfile.TemporaryDirectory(prefix="metarefine-pass-") as folder:
            path = Path(folder) / "shared"
            path.write_bytes(pickle.dumps((function, shared)))
            while waiting:
                parallel = Parallel(self._workers, return_as="generator", batch_size=1, pre_dispatch=f"{_AHEAD}*n_jobs")
                try:
                    for result, images in parallel(delayed(_from_file)(str(path), call) for call in list(waiting)):
                        del waiting[0]
                        attempts = 0
                        on_images(images)
                        yield result
                except TerminatedWorkerError:
                    attempts += 1
                    if attempts == _ATTEMPTS:
                        raise


class RayActors:
    """Actors of a Ray cluster; those that die are started again, and so are their calls.

    Args:
        address (str | None): Of the cluster; ``None`` starts one on this machine if none is connected.
        workers (int | None): Actors; ``None`` takes one for each core, or for each GPU where ``gpus`` is above 0.
        gpus (float): GPUs of each.
    """

    shares_memory = False

    def __init__(self, address: str | None, workers: int | None, gpus: float) -> None:
        ray = imported_ray()
        if not ray.is_initialized():
            own = {"include_dashboard": False, "object_store_memory": _STORE}
            ray.init(address=address, log_to_driver=False, **({} if address else own))
        resources = ray.cluster_resources()
        most = int(resources.get("GPU", 0) / gpus) if gpus else int(resources.get("CPU", 1))
        if most < 1:
            msg = f"{gpus:g} GPUs a worker were asked for; the cluster has {resources.get('GPU', 0):g}."
            raise ValueError(msg)
        actor = ray.remote(num_gpus=gpus, num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Actor)
        self._ray, self._actors = ray, [actor.remote() for _ in range(min(workers or most, most))]

    def map(self, function: Pass, calls: Iterable[Call], shared: object, on_images: OnImages) -> Iterator[Any]:
        """See `Executor.map`."""
        ray, given = self._ray, self._ray.put((function, shared))
        free, running, done = list(self._actors) * _AHEAD, {}, {}
        waiting, given_out, yielded = iter(enumerate(calls)), 0, 0
        while True:
            while free and given_out - yielded < _AHEAD**2 * len(self._actors):
                number, call = next(waiting, (-1, None))
                if call is None:
                    break
                actor = free.pop(0)
                running[actor.run.remote(given, call)] = number, actor
                given_out += 1
            if not running:
                return
            (first, *_), _ = ray.wait(list(running), num_returns=1)
            number, actor = running.pop(first)
            free.append(actor)
            done[number] = ray.get(first)
            while yielded in done:
                result, images = done.pop(yielded)
                yielded += 1
                on_images(images)
                yield result


class _Actor:
    """One worker of Ray."""

    def run(self, given: tuple[Pass, Any], call: Call) -> tuple[Any, int]:
        """What ``shared`` is comes by reference, once for each machine."""
        return _counted(*given, call)


def imported_ray() -> ModuleType:
    """Ray; ModuleNotFoundError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        msg = "--engine ray needs Ray. Run `pip install 'anomalib-metarefine[ray]'`."
        raise ModuleNotFoundError(msg) from error
    return ray


def make_executor(
    engine: Engine = "local", workers: int | None = None, address: str | None = None, gpus_per_worker: float = 0
) -> Executor:
    """The executor of a name.

    Args:
        engine (Engine): ``"local"``, ``"joblib"`` or ``"ray"``.
        workers (int | None): Processes or actors; ``None`` takes one for each core (of Ray: or GPU).
        address (str | None): Of a Ray cluster; ``"auto"`` finds the one of this machine; ``None`` starts one.
        gpus_per_worker (float): Of Ray.

    Raises:
        ModuleNotFoundError: If Ray is asked for and not installed.
        ValueError: If there is no such engine, or a number can't be.
    """
    if engine not in get_args(Engine):
        msg = f"engine must be one of {', '.join(get_args(Engine))}, found {engine!r}."
        raise ValueError(msg)
    if (workers is not None and workers < 1) or gpus_per_worker < 0:
        msg = f"workers must be at least 1 and GPUs at least 0, found {workers} and {gpus_per_worker:g}."
        raise ValueError(msg)
    if engine == "ray":
        return RayActors(address, workers, gpus_per_worker)
    if engine == "joblib":
        from joblib import cpu_count

        return Processes(workers or cpu_count())
    return InProcess()


def _from_file(path: str, call: Call) -> tuple[Any, int]:
    return _counted(*_loaded(path), call)


@lru_cache(maxsize=1)
def _loaded(path: str) -> tuple[Pass, Any]:
    """Once for each pass and process: what is shared may be large."""
    return pickle.loads(Path(path).read_bytes())


def _counted(function: Pass, shared: object, call: Call) -> tuple[Any, int]:
    """The result, and the images that the pass told of."""
    told: list[int] = []
    token = _told.set(told.append)
    try:
        return function(call[0], shared, *call[1:]), sum(told)
    finally:
        _told.reset(token)
