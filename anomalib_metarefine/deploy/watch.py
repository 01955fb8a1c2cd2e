"""Inference on images as they arrive: one JSON line per image, none twice, none lost."""

from __future__ import annotations

import sys
import time
import uuid
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from anomalib_metarefine import __version__
from anomalib_metarefine.deploy.arrivals import Folder, Lines, Rules, Seen
from anomalib_metarefine.deploy.detector import Detector, Prediction
from anomalib_metarefine.deploy.journal import Journal, Printer, Results
from anomalib_metarefine.deploy.metrics import Metrics
from anomalib_metarefine.deploy.monitor import Monitor, Recovery
from anomalib_metarefine.deploy.outbox import Outbox, first_hash
from anomalib_metarefine.deploy.overlay import write_overlay
from anomalib_metarefine.deploy.pipeline import ChangingFileError, Job, Pipeline
from anomalib_metarefine.deploy.records import about_event, about_image, images_of, now
from anomalib_metarefine.deploy.sender import Sender, Sink, sending
from anomalib_metarefine.deploy.stopping import stop_on_signals
from anomalib_metarefine.deploy.summary import Summary, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.status import Status

STANDARD = "-"  # standard input or output in place of a path
_STATE_EVERY = 1_000  # images from one saved state of the monitor to the next
_NAP_S = 0.1  # at most, so that a signal to stop is soon seen
_TELL_S = 0.5  # between updates of the line on the screen
_LISTING_SHARE = 4  # the pause is this many times what listing the folder took


@dataclass
class WatchSettings:
    """How to watch.

    Attributes:
        once (bool): End when the images that are there are done.
        poll (float): Seconds between looks at the folder.
        rules (Rules): When a file is taken.
        heatmaps (Path | None): Folder for overlays.
        heatmaps_of (str): ``"anomalous"`` (and uncertain) images or ``"all"``.
        drift (dict[str, Any] | None): Settings of the drift monitor; ``None`` switches it off.
        dynamic_threshold (tuple[float, float] | None): Raw scores that the threshold may move between.
        remember (int): Images to know again; more than the folder ever holds. About 150 bytes each.
        sinks (Sequence[Sink]): Who gets every line that has an ``id``, at least once.
        metrics (int | None): Port for Prometheus, on 127.0.0.1.
    """

    once: bool = False
    poll: float = 0.5
    rules: Rules = field(default_factory=Rules)
    heatmaps: Path | None = None
    heatmaps_of: Literal["anomalous", "all"] = "anomalous"
    drift: dict[str, Any] | None = field(default_factory=dict)
    dynamic_threshold: tuple[float, float] | None = None
    remember: int = 1_000_000
    sinks: Sequence[Sink] = ()
    metrics: int | None = None

    def of_monitor(self) -> dict[str, Any]:
        """What scores of earlier runs must have in common with this one's, for the monitor to go on from them."""
        limits = self.dynamic_threshold
        return {"drift": self.drift, "dynamic_threshold": list(limits) if limits is not None else None}


def watch(detector: Detector, source: str | Path, out: str | Path, settings: WatchSettings | None = None) -> Summary:
    """Process images as they arrive, until SIGTERM, SIGINT, the end of standard input, or once.

    Args:
        detector (Detector): The model.
        source (str | Path): Folder, or ``"-"`` for paths on standard input.
        out (str | Path): Results file, or ``"-"`` for standard output. A results file that is there is gone on with.
        settings (WatchSettings | None): How to.

    Returns:
        Summary: Of this run.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If another process writes to the results file, or the settings contradict each other.
        OSError: If results can't be written.
        ResultsRemovedError: If the results file was removed meanwhile.
    """
    settings = settings or WatchSettings()
    _check(source, out, settings)
    results: Results = Printer() if str(out) == STANDARD else Journal(Path(out))
    try:
        return _Watch(detector, source, results, settings).run()
    finally:
        results.close()


class _Watch:
    """One run of `watch`."""

    def __init__(self, detector: Detector, source: str | Path, results: Results, settings: WatchSettings) -> None:
        self._detector, self._results, self._settings = detector, results, settings
        self._summary, self._seen = Summary(), Seen(settings.remember)
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        done = self._seen.__contains__
        if str(source) == STANDARD:
            self._source: Folder | Lines = Lines(sys.stdin.fileno(), settings.rules, done)
        else:
            self._source = Folder(Path(source), settings.rules, done, settings.once)
        self._monitor = Monitor(detector, settings.drift, settings.dynamic_threshold)
        self._run: dict[str, Any] = {"model": detector.fingerprint, "settings": settings.of_monitor()}
        self._since_state, self._done, self._told, self._reachable = 0, 0, 0.0, True
        self._path = results.path if isinstance(results, Journal) else Path(STANDARD)
        self._senders = [Sender(sink, Outbox(self._path, sink.name), self._say) for sink in settings.sinks]
        self._metrics = Metrics(settings.metrics, self._senders) if settings.metrics is not None else None

    def run(self) -> Summary:
        with stop_on_signals() as stopped:
            self._resume()
            pipeline = Pipeline(self._detector, self._finish, anomaly_maps=self._settings.heatmaps is not None)
            with sending(self._senders, self._say), closing(self._metrics) if self._metrics else nullcontext():
                with closing(pipeline), self._console.status("waiting for images") as status:
                    self._loop(pipeline, stopped, status)
                self._write(*([self._state()] if self._since_state else []))
                self._results.sync()
        self._say(str(self._summary))
        return self._summary

    def _loop(self, pipeline: Pipeline, stopped: Callable[[], bool], status: Status) -> None:
        while not stopped():
            start, done = time.monotonic(), self._done
            arrivals = self._source.ready()
            pause = max(self._settings.poll, _LISTING_SHARE * (time.monotonic() - start))
            self._tell_trouble()
            for arrival in arrivals:
                if stopped():
                    break
                pipeline.push(arrival)
                self._tell(status)
            pipeline.flush()
            self._tell(status)
            self._write()
            self._results.sync()
            if self._source.exhausted:
                break
            if self._done == done:  # else more may have come in the meantime
                end = time.monotonic() + pause
                while not stopped() and not self._source.stirred and (rest := end - time.monotonic()) > 0:
                    time.sleep(min(rest, _NAP_S))

    def _resume(self) -> None:
        """Take up what earlier runs left in the results file."""
        events = []
        if isinstance(self._results, Journal):
            recovery = Recovery(self._run)
            for record in self._results.records():
                recovery.take(record)
                try:
                    for image in images_of(record):
                        self._seen.add(image)
                except (KeyError, TypeError):  # a line that is not ours must not stop every start
                    self._results.damaged += 1
            events = self._recover(recovery)
            if self._results.cut:
                self._say(f"A torn last line ({self._results.cut} bytes) was cut off; its image is processed again.")
            if self._results.damaged:
                self._say(f"Warning: {self._results.damaged} damaged lines; their images are processed again.")
        self._summary.before = len(self._seen)
        self._results.append(self._start(), *events)
        self._known_by = first_hash(self._path)
        if self._summary.before:
            self._say(f"Going on after {self._summary.before} images.")
        if self._settings.drift is not None and self._monitor.drifted is None:
            self._say("No drift monitor: the model was not calibrated, so it doesn't know what scores to expect.")

    def _start(self) -> dict[str, Any]:
        return {"event": "start", "id": uuid.uuid4().hex, "time": now(), **self._run, "version": __version__}

    def _write(self, *records: dict[str, Any]) -> None:
        """Write lines. In a file that had to be begun anew stands all that the next start must know."""
        if self._results.renewed():
            self._say("The results file was renamed or emptied; a new one is begun.")
            self._results.append({**self._start(), "previous": self._known_by})
            self._known_by = first_hash(self._path)
            done = self._source.processed()
            while part := list(islice(done, _STATE_EVERY)):
                self._results.append({"event": "earlier", "images": part})
            records = (*records, self._state())
        self._results.append(*records)
        for sender in self._senders:
            sender.wake()

    def _recover(self, recovery: Recovery) -> list[dict[str, Any]]:
        try:
            return [about_event(event, self._run["model"]) for event in recovery.apply(self._monitor)]
        except (ValueError, KeyError, TypeError) as error:
            self._say(f"Warning: the monitor starts afresh, as its saved state can't be used: {error}")
            self._monitor = Monitor(self._detector, self._settings.drift, self._settings.dynamic_threshold)
            return []

    def _finish(self, job: Job) -> None:
        """Write an image's line, or leave it for another try."""
        if job.error is not None:
            if isinstance(job.error, ChangingFileError) or not self._source.gives_up(job.arrival, job.error):
                return
            self._summary.decisions["unreadable"] += 1
            reason = str(job.error) or type(job.error).__name__
            line = {**about_image(job, self._run["model"]), "decision": None, "error": reason, "time": now()}
            self._write(line)
            self._note(job, line)
            return
        prediction, threshold = job.prediction, self._monitor.threshold
        assert prediction is not None, "a job that has ended without an error has one"
        decision = self._detector.decide(prediction.anomalous, prediction.raw_score, threshold)
        line = {
            **about_image(job, self._run["model"]),
            "score": prediction.score,
            "raw_score": prediction.raw_score,
            "threshold": threshold,
            "decision": decision,
            "latency_ms": round(1e3 * prediction.latency_s, 3),
        }
        heatmap = self._heatmap(job, prediction, decision)
        events = [about_event(event, self._run["model"]) for event in self._monitor.update(prediction.raw_score)]
        line |= {"drift": self._monitor.drifted, "time": now()} | ({"heatmap": heatmap} if heatmap else {})
        self._since_state += self._monitor.drifted is not None
        state = [self._state()] if self._since_state >= _STATE_EVERY else []
        self._write(line, *events, *state)
        self._note(job, line)
        self._summary.decisions[decision] += 1
        self._summary.latencies.append(line["latency_ms"])
        for event in events:
            self._summary.events[event["event"]] += 1
            self._say(in_words(event))

    def _note(self, job: Job, line: dict[str, Any]) -> None:
        self._seen.add(job.arrival)
        self._done += 1
        if self._metrics:
            self._metrics.take(line)

    def _heatmap(self, job: Job, prediction: Prediction, decision: str) -> str | None:
        folder = self._settings.heatmaps
        if folder is None or (self._settings.heatmaps_of == "anomalous" and decision == "normal"):
            return None
        if job.image is None or prediction.anomaly_map is None:  # no map was asked for
            return None
        file = folder / f"{Path(job.arrival.path).stem}-{str(job.sha256)[:12]}.png"
        try:
            write_overlay(file, job.image, prediction.anomaly_map)
        except OSError as error:  # the decision matters more
            self._say(f"Warning: no heat map: {error}")
            return None
        return str(file)

    def _state(self) -> dict[str, Any]:
        self._since_state = 0
        return {"event": "state", "monitor": self._monitor.to_dict()}

    def _tell_trouble(self) -> None:
        if self._source.reachable != self._reachable:
            self._reachable = self._source.reachable
            self._say("The folder is there again." if self._reachable else "Warning: the folder is gone; waiting.")
        listed, most = self._source.listed, self._settings.remember
        if listed > most:
            msg = f"The folder holds {listed} images, more than are remembered ({most}), so some would be processed "
            msg += "twice. Move images that are done away, or pass a larger --remember."
            raise ValueError(msg)

    def _tell(self, status: Status) -> None:
        """Bring the line on the screen up to date, now and then."""
        if time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            status.update(Text(str(self._summary)))

    def _say(self, text: str) -> None:
        self._console.print(Text(text))


def _check(source: str | Path, out: str | Path, settings: WatchSettings) -> None:
    if settings.sinks and str(out) == STANDARD:
        msg = "Webhook and MQTT get their lines from the results file: pass one as --out, not standard output."
        raise ValueError(msg)
    times = {"poll": settings.poll, "settle": settings.rules.settle, "patience": settings.rules.patience}
    for name, value in times.items():
        if not value >= 0:
            msg = f"{name} must be at least 0 seconds, found {value}."
            raise ValueError(msg)
    if settings.heatmaps is not None:
        settings.heatmaps.mkdir(parents=True, exist_ok=True)
        if str(source) != STANDARD and settings.heatmaps.resolve().is_relative_to(Path(source).resolve()):
            msg = f"The heat maps' folder {settings.heatmaps} lies in {source}: they would be taken for images."
            raise ValueError(msg)
