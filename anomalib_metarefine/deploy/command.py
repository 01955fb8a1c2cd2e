"""The line's commands, `metarefine watch` and `serve`; `metarefine-watch` and `-serve` where only its part is there."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from anomalib_metarefine.deploy.detector import Detector

WATCH = (
    "Writes one JSON line per image, none twice, none lost, also after kill -9: the results file is the memory. "
    "SIGTERM and Ctrl-C finish what is in flight. Needs neither torch nor anomalib. Format: docs/watch.md."
)
SERVE = (
    "Answers over HTTP with the scores and decisions of `watch`: POST an image file to /v1/score, or tensors to "
    "/v2/models/NAME/infer (Open Inference Protocol, KServe v2). See docs/examples/model_server.md."
)
_OWN = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str] | None = None) -> int:
    """Run ``metarefine-watch``.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used, 130 after Ctrl-C.
    """
    return _main("metarefine-watch", WATCH, add_arguments, run, argv)


def main_serve(argv: list[str] | None = None) -> int:
    """Run ``metarefine-serve``; as `main`."""
    return _main("metarefine-serve", SERVE, add_serve_arguments, run_serve, argv)


def _main(
    name: str,
    description: str,
    arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(name, description=description, formatter_class=shown)
    parser.add_argument("--version", action="version", version=f"anomalib-metarefine-line {__version__}")
    arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C.", file=sys.stderr)
        return 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` wants to know."""
    add = parser.add_argument
    _add_model(parser)
    add("source", metavar="SOURCE", help="folder of images, or - for paths on standard input, one per line")
    add("--out", required=True, metavar="FILE", help="JSON lines; gone on with if there; - for standard output")
    add("--once", action="store_true", help="end when the images that are there are done")
    add("--heatmaps", type=Path, metavar="DIR", help="write overlays of the anomaly map into this folder")
    add("--heatmaps-of", choices=["anomalous", "all"], default="anomalous", help="anomalous includes uncertain")
    add("--extensions", nargs="+", metavar="EXT", help="file names to look for in a folder")
    add("--poll", type=float, default=0.5, metavar="S", help="seconds between looks at the folder")
    add("--settle", type=float, default=0.2, metavar="S", help="a file must not have changed for so many seconds")
    add("--patience", type=float, default=10.0, metavar="S", help="seconds until an unreadable file is called corrupt")
    _add_detector(parser)
    add("--no-drift", dest="drift", action="store_false", help="no drift monitor")
    add("--drift-window", type=int, default=500, metavar="N", help="latest images that quartiles are told of")
    add("--drift-rate", type=float, default=0.01, metavar="P", help="chance of a false alarm in --drift-horizon images")
    add("--drift-horizon", type=int, default=10_000, metavar="N", help="see --drift-rate")
    add("--drift-defects", type=float, default=0.05, metavar="P", help="share of defects that is not called drift")
    limits = ("LOW", "HIGH")
    add("--dynamic-threshold", type=float, nargs=2, metavar=limits, help="raw scores the threshold may move between")
    add("--remember", type=int, default=1_000_000, metavar="N", help="images to know again; more than the folder holds")
    add("--webhook", metavar="URL", help="post the lines there, too, as JSON arrays")
    add("--mqtt", metavar="HOST:PORT/TOPIC", help="publish the lines there, too (package paho-mqtt)")
    add("--metrics", type=int, metavar="PORT", help="figures for Prometheus, on 127.0.0.1 (package prometheus-client)")


def run(options: argparse.Namespace) -> int:
    """Watch, and answer the exit code; raises what `watch` does."""
    from anomalib_metarefine.deploy.arrivals import Rules
    from anomalib_metarefine.deploy.journal import ResultsRemovedError
    from anomalib_metarefine.deploy.sinks import Mqtt, Webhook
    from anomalib_metarefine.deploy.watch import WatchSettings, watch
    from anomalib_metarefine.images.reading import EXTENSIONS

    drift = {"window": options.drift_window, "false_alarm_rate": options.drift_rate}
    drift |= {"horizon": options.drift_horizon, "defect_rate": options.drift_defects}
    extensions = tuple(options.extensions or EXTENSIONS)
    settings = WatchSettings(
        once=options.once,
        poll=options.poll,
        rules=Rules(options.settle, options.patience, extensions),
        heatmaps=options.heatmaps,
        heatmaps_of=options.heatmaps_of,
        drift=drift if options.drift else None,
        dynamic_threshold=tuple(options.dynamic_threshold) if options.dynamic_threshold else None,
        remember=options.remember,
        sinks=[kind(where) for kind, where in ((Webhook, options.webhook), (Mqtt, options.mqtt)) if where],
        metrics=options.metrics,
    )
    try:
        watch(_detector(options), options.source, options.out, settings)
    except ResultsRemovedError as error:
        print(f"metarefine: {error}", file=sys.stderr)
        return 1
    return 0


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run_serve` wants to know."""
    add = parser.add_argument
    _add_model(parser)
    add("--name", help="of the model, in addresses; default: as metadata.json has it")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--host", default="127.0.0.1", help="address to listen on; others than this machine's own let others in")
    add("--largest", type=int, default=64, metavar="MB", help="of a request")
    _add_detector(parser)


def run_serve(options: argparse.Namespace) -> int:
    """Serve, and answer the exit code; raises what `serve` does."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        msg = f"serve needs {' and '.join(missing)}: pip install {' '.join(missing)}."
        raise ModuleNotFoundError(msg)
    from anomalib_metarefine.deploy.server import serve

    detector = _detector(options)
    name = options.name or (detector.sidecar.model.get("name") if detector.sidecar else None) or "model"
    if not re.fullmatch(r"[\w.-]+", name):
        msg = f"A model's name in addresses has letters, digits, _, . and - only, found {name}. Pass another as --name."
        raise ValueError(msg)
    if options.host not in _OWN:
        warning = "metarefine: everybody who can reach %s can ask. There is no password and no TLS: a proxy has both."
        print(warning % options.host, file=sys.stderr)

    def opened(address: str) -> None:
        print(f"{name}: {address}/v2/models/{name}, {address}/v1/score\nCtrl-C ends it.", flush=True)

    serve(detector, name, options.host, options.port, options.largest * 10**6, opened)
    return 0


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="folder of an exported model: OpenVINO or ONNX")


def _add_detector(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--streams", type=int, default=2, metavar="N", help="images inferred at the same time")
    add("--threads", type=int, metavar="N", help="processor threads of all streams")
    add("--device", default="CPU", help="OpenVINO's name of it")
    add("--precision", default="f32", choices=["f32", "f16", "bf16"], help="f32 scores like the checkpoint")
    add("--bit-depth", type=int, metavar="N", help="bits in use of images with more than 8; default: as in training")
    add("--no-verify", dest="verify", action="store_false", help="don't compare the model files with their SHA-256")


def _detector(options: argparse.Namespace) -> Detector:
    from anomalib_metarefine.deploy.detector import Detector

    names = ("device", "precision", "streams", "threads", "verify", "bit_depth")
    return Detector(options.model, **{name: getattr(options, name) for name in names})
