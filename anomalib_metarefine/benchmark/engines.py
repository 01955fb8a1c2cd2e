"""Where the cells of a benchmark are run: in this process, in several, or on the machines of a Ray cluster."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Protocol

from anomalib_metarefine.benchmark.cells import release
from anomalib_metarefine.features.executors import imported_ray

if TYPE_CHECKING:
    from collections.abc import Callable

_UNKNOWN_MB = 4096  # asked for a task of which none has been measured yet
_MARGIN = 1.2  # of memory, from one cell of a model to the next


class Engine(Protocol):
    """What runs tasks."""

    jobs: int  # processes that work at a time

    @property
    def slots(self) -> int:
        """Tasks that may be given to it at a time."""

    def submit(self, call: Callable[[], Any], memory_mb: float | None) -> Future:
        """Run a function of no arguments.

        Args:
            call (Callable): Can be pickled, and so can its result.
            memory_mb (float | None): The most that such a task needed so far, ``None`` if that is not known;
                infinity for one that is to be alone.
        """

    def close(self) -> None:
        """Stop what still runs."""


class ThisProcess:
    """One task after the other, at once."""

    jobs = slots = 1

    def submit(self, call: Callable[[], Any], memory_mb: float | None) -> Future:  # noqa: ARG002
        """See `Engine`."""
        done: Future = Future()
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        """See `Engine`."""
        release()


class Processes:
    """Processes of this machine, which share its memory as it comes."""

    def __init__(self, jobs: int) -> None:
        self.jobs = self.slots = jobs
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, call: Callable[[], Any], memory_mb: float | None) -> Future:  # noqa: ARG002
        """See `Engine`."""
        try:
            return self._start().submit(call)
        except BrokenProcessPool:  # by a process that the system killed
            self._pool = None
            return self._start().submit(call)

    def _start(self) -> ProcessPoolExecutor:
        from anomalib_metarefine.benchmark.training import quiet

        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.jobs, get_context("spawn"), quiet)
        return self._pool

    def close(self) -> None:
        """See `Engine`."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class RayCluster:
    """Processes on a Ray cluster. Each task gets a core, and the memory that tasks of its kind needed before.

    Args:
        address (str | None): Of a cluster, ``auto`` for the one that this machine belongs to; ``None`` starts one on
            this machine.
        gpus (float): GPUs of each task.
        **settings (Any): Of ``ray.init``, such as ``num_cpus``.

    Raises:
        ModuleNotFoundError: If Ray is not installed.
        ConnectionError: If there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, gpus: float = 0, **settings: Any) -> None:  # noqa: ANN401
        self._ray = ray = imported_ray()
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False, **settings)
        # No retries by Ray: what ran out of memory is to be tried again alone.
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_quietly)

    @property
    def jobs(self) -> int:
        """Cores of the cluster as it is now."""
        return int(self._ray.cluster_resources().get("CPU", 1))

    @property
    def slots(self) -> int:
        """More than run: what waits makes an autoscaling cluster grow."""
        return 2 * self.jobs

    def submit(self, call: Callable[[], Any], memory_mb: float | None) -> Future:
        """See `Engine`."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        working = [node for node in alive if node.get("CPU")]  # a head without cores runs no task
        largest = max(node.get("memory", 0) for node in working or alive)
        wanted_mb = _UNKNOWN_MB if memory_mb is None else _MARGIN * memory_mb
        return self._remote.options(memory=int(min(wanted_mb * 2**20, largest))).remote(call).future()

    def close(self) -> None:
        """See `Engine`."""
        self._ray.shutdown()


def _quietly(call: Callable[[], Any]) -> Any:  # noqa: ANN401
    from anomalib_metarefine.benchmark.training import quiet

    quiet()
    return call()


def lost_its_process(error: BaseException) -> bool:
    """Whether a task ended because the system killed its process, which it does where memory is short."""
    return isinstance(error, BrokenProcessPool) or type(error).__name__ in (
        "OutOfMemoryError", "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError"
    )  # fmt: skip
