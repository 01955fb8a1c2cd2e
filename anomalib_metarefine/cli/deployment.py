"""Subcommands about trained and exported models."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.cli.command import SHOWN, Command

if TYPE_CHECKING:
    import argparse


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="checkpoint of a trained MetaRefine")
    add("--data", metavar="DATA", help="normal images it was not trained on; default: its training's left-out scores")
    add("--out", required=True, type=Path, metavar="CKPT", help="the calibrated checkpoint; must not exist")
    add("--false-alarm-rate", type=float, default=0.01, metavar="P", help="share of normal images above the threshold")
    add("--confidence", type=float, default=0.95, metavar="P", help="that this is kept")


def _calibrate(options: argparse.Namespace) -> int:
    from anomalib_metarefine.images.sources import read_source
    from anomalib_metarefine.model.calibration import calibrate_checkpoint

    paths = read_source(options.data).paths if options.data else None
    found = calibrate_checkpoint(options.checkpoint, options.out, paths, options.false_alarm_rate, options.confidence)
    aside = f", {found.set_aside} of them set aside as defective" if found.set_aside else ""
    print(f"Threshold {found.threshold:.4g} from {found.images} images{aside}, by the {found.method}.")
    print(f"False alarms: {found.bound:.2%} at most, with a confidence of {found.confidence:.0%}.")
    if found.bound > found.false_alarm_rate:
        print(f"{found.false_alarm_rate:.2%} was asked for and is the estimate, but so few images can't promise it.")
    band = found.uncertain
    print(f"Uncertain from {band.lower:.4g} to {band.upper:.4g}: about {band.expected_share:.1%} of normal images.")
    print(f"{options.out}: export it with `anomalib export --model MetaRefine --ckpt_path {options.out} ...`")
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", type=Path, help="folder of an exported model: OpenVINO or ONNX")
    add("--ckpt", required=True, type=Path, metavar="CKPT", help="the checkpoint it was exported from")
    add("--data", required=True, metavar="DATA", help="images of the line: folder, CSV or Parquet")
    add("--limit", type=int, default=500, metavar="N", help="images at most, evenly spread over DATA")
    add("--runs", type=int, default=300, metavar="N", help="inferences to time")
    add("--out", type=Path, metavar="JSON", help="write the figures into this file, too")


def _verify(options: argparse.Namespace) -> int:
    from anomalib_metarefine.images.sources import read_source
    from anomalib_metarefine.model.verify import verify_deployment

    paths = read_source(options.data).paths
    paths = paths[:: -(-len(paths) // options.limit)]
    found = verify_deployment(options.model, options.ckpt, paths, options.runs)
    if options.out:
        options.out.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    print(f"{found.images} images, {found.precision}: scores differ by {found.largest_difference:.2g} relative at most")
    if found.auroc:
        print(f"image AUROC: {found.auroc[0]:.4f} checkpoint, {found.auroc[1]:.4f} deployed")
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in found.latency_ms.items())
    print(f"latency: {times}; throughput: {found.images_per_second:.0f} images per second")
    for path in found.decisions_differ[:SHOWN]:
        print(f"decided differently: {path}")
    for problem in found.problems:
        print(f"metarefine: {problem}", file=sys.stderr)
    print("FAILED" if found.problems else "The deployed model decides like the checkpoint.")
    return 1 if found.problems else 0


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
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
    add("--no-verify", dest="verify", action="store_false", help="don't compare the model files with their SHA-256")
    add("--no-drift", dest="drift", action="store_false", help="no drift monitor")
    add("--drift-window", type=int, default=500, metavar="N", help="latest images that quartiles are told of")
    add("--drift-rate", type=float, default=0.01, metavar="P", help="chance of a false alarm in --drift-horizon images")
    add("--drift-horizon", type=int, default=10_000, metavar="N", help="see --drift-rate")
    add("--drift-defects", type=float, default=0.05, metavar="P", help="share of defects that is not called drift")
    limits = ("LOW", "HIGH")
    add("--dynamic-threshold", type=float, nargs=2, metavar=limits, help="raw scores the threshold may move between")
    add("--remember", type=int, default=1_000_000, metavar="N", help="images to know again; more than the folder holds")


def _watch(options: argparse.Namespace) -> int:
    from anomalib_metarefine.deploy.arrivals import Rules
    from anomalib_metarefine.deploy.detector import Detector
    from anomalib_metarefine.deploy.watch import WatchSettings, watch
    from anomalib_metarefine.images.reading import EXTENSIONS

    named = {name: getattr(options, name) for name in ("device", "precision", "streams", "threads", "verify")}
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
    )
    watch(detector, options.source, options.out, settings)
    return 0


DEPLOYMENT = {
    "calibrate": Command(
        "choose a model's threshold from normal images alone",
        "For a stated share of false alarms, with its confidence bound; a tenth of the images may be defective. "
        "Writes a new checkpoint, to be exported as usual.",
        _calibrate_arguments,
        _calibrate,
    ),
    "verify": Command(
        "show that a deployed model decides like its checkpoint",
        "Compares files, origin, scores and decisions on real images, and times the deployed model on this machine. "
        "Exit code 0 if all agrees, else 1.",
        _verify_arguments,
        _verify,
    ),
    "watch": Command(
        "inference on images as they arrive",
        "Writes one JSON line per image, none twice, none lost, also after kill -9: the results file is the memory. "
        "SIGTERM and Ctrl-C finish what is in flight. Needs neither torch nor anomalib. Format: docs/watch.md.",
        _watch_arguments,
        _watch,
    ),
}
