"""Figures of a watch for Prometheus, on this machine only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anomalib_metarefine.deploy.detector import DECISIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.deploy.sender import Sender

_SCORES = [round(0.05 * i, 2) for i in range(1, 21)]


class Metrics:
    """Serves ``http://127.0.0.1:PORT/metrics``, counted from the start of the process.

    Args:
        port (int): To listen on.
        senders (Sequence[Sender]): To tell of, too.

    Raises:
        ModuleNotFoundError: If prometheus-client is not installed.
        OSError: If the port is taken.
    """

    def __init__(self, port: int, senders: Sequence[Sender]) -> None:
        try:
            import prometheus_client as prometheus
        except ModuleNotFoundError as error:
            msg = "--metrics needs the package prometheus-client: pip install prometheus-client."
            raise ModuleNotFoundError(msg) from error
        registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        named: dict[str, Any] = {"namespace": "metarefine", "registry": registry}
        self._images = prometheus.Counter("images", "Images by decision.", ["decision"], **named)
        for decision in (*DECISIONS, "unreadable"):
            self._images.labels(decision)
        self._scores = prometheus.Histogram(
            "score", "Image scores; the exported threshold is 0.5.", buckets=_SCORES, **named
        )
        self._latency = prometheus.Histogram("inference_seconds", "From pixels to the answer.", **named)
        self._drifted = prometheus.Gauge("drifted", "Whether scores have drifted.", **named)
        self._threshold = prometheus.Gauge("threshold", "Raw threshold that is in force.", **named)
        up = prometheus.Gauge("sink_up", "Whether a receiver of results takes them.", ["sink"], **named)
        for sender in senders:
            up.labels(sender.sink.name).set_function(sender.is_up)
        try:
            self._server, _ = prometheus.start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            msg = f"Port {port} for --metrics can't be had: {error.strerror}. Pass another one."
            raise OSError(msg) from error

    def take(self, line: dict[str, Any]) -> None:
        """Count an image by its line in the results."""
        self._images.labels(line["decision"] or "unreadable").inc()
        if line["decision"] is None:
            return
        self._scores.observe(line["score"])
        self._latency.observe(line["latency_ms"] / 1e3)
        self._drifted.set(bool(line["drift"]))
        if line["threshold"] is not None:
            self._threshold.set(line["threshold"])

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
