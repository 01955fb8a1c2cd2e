"""Watching from a command line: `metarefine watch`, and `metarefine-watch` where only the line's part is installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anomalib_metarefine import __version__

DESCRIPTION = (
    "Writes one JSON line per image, none twice, none lost, also after kill -9: the results file is the memory. "
    "SIGTERM and Ctrl-C finish what is in flight. Needs neither torch nor anomalib. Format: docs/watch.md."
)


def main(argv: list[str] | None = None) -> int:
    """Run ``metarefine-watch``.

    Args:
        argv (list[str] | None): Arguments; ``None`` takes those of the process.

    Returns:
        int: Exit code; 2 for input that can't be used, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        "metarefine-watch", description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"anomalib-metarefine-line {__version__}")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"metarefine-watch: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metarefine-watch: stopped by Ctrl-C.", file=sys.stderr)
        return 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` wants to know."""
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", type=Path, help="folder of an exported model: OpenVINO or ONNX")
    add("source", metavar="SOURCE", help="folder of images, or - for paths on standard input, one per line")
    add("--out", required=True, metavar="FILE", help="JSON lines; gone on with if there; - for standard output")
    add("--once", action="store_true", help="end when the images that are there are done")
    add("--heatmaps", type=Path, metavar="DIR", help="write overlays of the anomaly map into this folder")
    add("--heatmaps-of", choices=["anomalous", "all"], default="anomalous", help="anomalous includes uncertain")
    add("--extensions", nargs="+", metavar="EXT", help="file names to look for in a folder")
    add("--poll", type=float, default=0.5, metavar="S", help="seconds between looks at the folder")
    add("--settle", type=float, default=0.2, metavar="S", help="a file must not have changed for so many seconds")
    add("--patience", type=float, default=10.0, metavar="S", help="seconds until an unreadable file is called corrupt")
    add("--streams", type=int, default=2, metavar="N", help="images inferred at the same time")
    add("--threads", type=int, metavar="N", help="processor threads of all streams")
    add("--device", default="CPU", help="OpenVINO's name of it")
    add("--precision", default="f32", choices=["f32", "f16", "bf16"], help="f32 scores like the checkpoint")
    add("--bit-depth", type=int, metavar="N", help="bits in use of images with more than 8; default: as in training")
    add("--no-verify", dest="verify", action="store_false", help="don't compare the model files with their SHA-256")
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
    from anomalib_metarefine.deploy.detector import Detector
    from anomalib_metarefine.deploy.journal import ResultsRemovedError
    from anomalib_metarefine.deploy.sinks import Mqtt, Webhook
    from anomalib_metarefine.deploy.watch import WatchSettings, watch
    from anomalib_metarefine.images.reading import EXTENSIONS

    names = ("device", "precision", "streams", "threads", "verify", "bit_depth")
    named = {name: getattr(options, name) for name in names}
    detector = Detector(options.model, **named)
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
        watch(detector, options.source, options.out, settings)
    except ResultsRemovedError as error:
        print(f"metarefine: {error}", file=sys.stderr)
        return 1
    return 0
