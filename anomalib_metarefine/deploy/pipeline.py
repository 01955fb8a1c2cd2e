"""From files to predictions: reading, decoding and inference overlap, memory is bounded, the order stays."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer  # Python 3.10 has two of that name
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anomalib_metarefine.deploy.arrivals import Arrival, look
from anomalib_metarefine.deploy.detector import Detector, Prediction
from anomalib_metarefine.images.reading import UnreadableImageError, decode_image, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

_LONGEST_S = 120.0  # for one inference: far more than any takes, so that a driver's fault can't hang the line


class ChangingFileError(ValueError):
    """A file that changed while it was read."""


@dataclass
class Job:
    """An image on its way.

    Attributes:
        arrival (Arrival): The file.
        sha256 (str | None): Of its content, once it was read.
        image (np.ndarray | None): ``[H, W, 3]`` float32 in [0, 1]; kept if an anomaly map was asked for.
        prediction (Prediction | None): Once it is there.
        error (Exception | None): Why there is none.
    """

    arrival: Arrival
    sha256: str | None = None
    image: np.ndarray | None = None
    prediction: Prediction | None = None
    error: Exception | None = None


class Pipeline:
    """Reads files in threads, runs the model's asynchronous queue, and hands on the jobs in the order they came.

    At most ``2 * (ahead + 1)`` images are in memory.

    Args:
        detector (Detector): The model.
        finish (Callable): Gets every job, in the thread that calls `push` and `flush`.
        anomaly_maps (bool): Ask for maps too.
    """

    def __init__(self, detector: Detector, finish: Callable[[Job], None], anomaly_maps: bool = False) -> None:
        self._detector, self._finish, self._maps = detector, finish, anomaly_maps
        self._ahead = 2 * detector.streams
        self._readers = ThreadPoolExecutor(max_workers=max(2, detector.streams), thread_name_prefix="read")
        self._reading: deque[tuple[Job, Future[np.ndarray]]] = deque()
        self._running: deque[tuple[Job, Future[Prediction] | None]] = deque()

    def push(self, arrival: Arrival) -> None:
        """Take a file; finishes others while there is no room."""
        job = Job(arrival)
        self._reading.append((job, self._readers.submit(_load, job, self._detector.bit_depth)))
        if len(self._reading) > self._ahead:
            self._start_oldest()

    def flush(self) -> None:
        """Finish all."""
        while self._reading:
            self._start_oldest()
        while self._running:
            self._finish_oldest()

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(cancel_futures=True)

    def _start_oldest(self) -> None:
        job, reading = self._reading.popleft()
        answer = None
        try:
            image = reading.result()
            answer = self._detector.submit(image, self._maps)
            job.image = image if self._maps else None
        except Exception as error:  # one image's trouble must not stop the line
            job.error = error
        self._running.append((job, answer))
        while self._running and (len(self._running) > self._ahead or _is_done(self._running[0][1])):
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        job, answer = self._running.popleft()
        try:
            job.prediction = answer.result(_LONGEST_S) if answer else None
        except NoAnswer:
            job.error = TimeoutError(f"The model gave no answer within {_LONGEST_S:.0f} seconds.")
        except Exception as error:
            job.error = error
        self._finish(job)


def _is_done(answer: Future[Prediction] | None) -> bool:
    return answer is None or answer.done()


def _load(job: Job, bit_depth: int | None) -> np.ndarray:
    """Read and decode a file: its bytes once, for hash and pixels."""
    content = read_bytes(job.arrival.path)
    if look(job.arrival.path) != job.arrival:
        msg = f"{job.arrival.path} changed while it was read."
        raise ChangingFileError(msg)
    try:
        image = decode_image(content, job.arrival.path, bit_depth)
    except UnreadableImageError as error:
        job.sha256 = error.sha256
        raise
    job.sha256 = image.sha256
    return image.pixels
