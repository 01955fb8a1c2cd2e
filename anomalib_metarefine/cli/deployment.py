"""Subcommands about trained and exported models."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from anomalib_metarefine.cli.command import SHOWN, Command, command_line, require
from anomalib_metarefine.deploy import command as line

_CHECKPOINT, _IMAGES = "a checkpoint of a trained model", "a folder of images, or a CSV or Parquet table of paths"
_MODEL_HELP = "class in anomalib.models; default: the one that the checkpoint names, as those of MetaRefine do"


def _count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        msg = f"must be a whole number of at least 1, found {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="checkpoint of a trained model of anomalib")
    add("--data", metavar="DATA", help="normal images it was not trained on; default: its training's left-out scores")
    add("--out", required=True, type=Path, metavar="CKPT", help="the calibrated checkpoint; must not exist")
    add("--false-alarm-rate", type=float, default=0.01, metavar="P", help="share of normal images above the threshold")
    add("--confidence", type=float, default=0.95, metavar="P", help="that this is kept")
    add(
        "--ignore",
        type=Path,
        metavar="FILE",
        help="regions to ignore: a picture, black there, or polygons; needs --data",
    )
    add("--model", metavar="NAME", help=_MODEL_HELP)


def _calibrate(options: argparse.Namespace) -> int:
    require(options.checkpoint, _CHECKPOINT)
    if options.data:
        require(options.data, _IMAGES)
    from anomalib_metarefine.model.calibration import calibrate_checkpoint
    from anomalib_metarefine.model.evaluation import read_labelled

    images = read_labelled(options.data) if options.data else (None, None)
    found, detection = calibrate_checkpoint(
        options.checkpoint, options.out, *images, options.false_alarm_rate, options.confidence, options.model,
        options.ignore,
    )  # fmt: skip
    aside = f", {found.set_aside} of them set aside as defective" if found.set_aside else ""
    print(f"Threshold {found.threshold:.4g} from {found.images} images{aside}, by the {found.method}.")
    print(f"False alarms: {found.bound:.2%} at most, with a confidence of {found.confidence:.0%}.")
    if found.bound > found.false_alarm_rate:
        print(f"{found.false_alarm_rate:.2%} was asked for and is the estimate, but so few images can't promise it.")
    band = found.uncertain
    print(f"Uncertain from {band.lower:.4g} to {band.upper:.4g}: about {band.expected_share:.1%} of normal images.")
    if detection:
        print("\n".join(detection.lines()))
        print("The normal images among them are those that the threshold was chosen on.")
    print(f"Next: {command_line('metarefine', 'export', options.out, '--out', 'DIR')}")
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="checkpoint of a trained model of anomalib")
    add("--out", required=True, type=Path, metavar="DIR", help="weights/openvino (onnx, torch) is made in it")
    add("--format", default="openvino", choices=["openvino", "onnx", "torch"], help="of the model")
    add("--precision", default="FP32", choices=["FP32", "FP16", "INT8"], help="of an OpenVINO model")
    add("--input-size", type=_count, nargs=2, metavar=("H", "W"), help="the only size it takes; default: any")
    add("--data", metavar="YAML", help="datamodule to choose the ranges of INT8 by; MetaRefine finds its own images")
    add("--exact-resize", action=argparse.BooleanOptionalAction, default=True, help="resize as the training does")
    add("--model", metavar="NAME", help=_MODEL_HELP)


def _export(options: argparse.Namespace) -> int:
    require(options.checkpoint, _CHECKPOINT)
    if options.data:
        require(options.data, "the YAML of a datamodule")
    from anomalib.deploy.export import CompressionType

    from anomalib_metarefine.images.datamodules import load_datamodule
    from anomalib_metarefine.model.checkpoints import load_checkpoint
    from anomalib_metarefine.model.export import export_model

    compression = {"FP16": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}.get(options.precision)
    path = export_model(
        load_checkpoint(options.checkpoint, options.model),
        options.out,
        options.format,
        compression,
        tuple(options.input_size) if options.input_size else None,
        options.exact_resize,
        load_datamodule(options.data) if options.data else None,
    )
    print(f"{path}, and metadata.json beside it")
    if options.format != "torch":
        verify = command_line("metarefine", "verify", path.parent, "--ckpt", options.checkpoint, "--data", "DATA")
        print(f"Next: {verify}")
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="MODEL_DIR", type=Path, help="folder of an exported model: OpenVINO or ONNX")
    add("--ckpt", required=True, type=Path, metavar="CKPT", help="the checkpoint it was exported from")
    add("--data", required=True, metavar="DATA", help="images of the line: folder, CSV or Parquet")
    add("--limit", type=_count, default=500, metavar="N", help="images at most, evenly spread over DATA")
    add("--runs", type=_count, default=300, metavar="N", help="inferences to time")
    add("--out", type=Path, metavar="JSON", help="write the figures into this file, too; it is replaced")
    add("--model", metavar="NAME", help=_MODEL_HELP)


def _verify(options: argparse.Namespace) -> int:
    require(options.folder, "the folder of an exported model")
    require(options.ckpt, "the checkpoint that the model was exported from")
    require(options.data, _IMAGES)
    if options.out:
        require(options.out.parent, f"a folder to write {options.out.name} into")
    from anomalib_metarefine.model.evaluation import read_labelled
    from anomalib_metarefine.model.verify import verify_deployment

    paths, anomalous = read_labelled(options.data)
    part = slice(None, None, -(-len(paths) // options.limit))
    labels = None if anomalous is None else anomalous[part]
    say = {} if options.quiet else {"say": _to_standard_error}
    found = verify_deployment(options.folder, options.ckpt, paths[part], labels, options.runs, options.model, **say)
    if options.out:
        options.out.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    print(f"{found.images} images, {found.precision}: scores differ by {found.largest_difference:.2g} relative at most")
    if found.auroc:
        print(f"image AUROC: {found.auroc[0]:.4f} checkpoint, {found.auroc[1]:.4f} deployed")
    if found.detection:
        print("\n".join(found.detection.lines()))
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in found.latency_ms.items())
    print(f"latency: {times}; throughput: {found.images_per_second:.0f} images per second")
    for path in found.decisions_differ[:SHOWN]:
        print(f"decided differently: {path}")
    for problem in found.problems:
        print(f"metarefine: {problem}", file=sys.stderr)
    print("FAILED" if found.problems else "The deployed model decides like the checkpoint.")
    return 1 if found.problems else 0


def _to_standard_error(text: str) -> None:
    print(f"metarefine: {text}", file=sys.stderr, flush=True)


DEPLOYMENT = {
    "calibrate": Command(
        "choose a model's threshold from normal images alone",
        "For a stated share of false alarms, with its confidence bound; a tenth of the images may be defective. "
        "For any model of anomalib; from left-out scores of the training, without --data, for MetaRefine only. Where "
        "folders named good and others label the images of DATA, defective ones are not calibrated on, but counted.",
        _calibrate_arguments,
        _calibrate,
    ),
    "export": Command(
        "export a model so that it scores like its checkpoint",
        "For any model of anomalib: as `anomalib export`, but with the resize of the training in the graph, thresholds "
        "worked out beforehand, and metadata.json beside it.",
        _export_arguments,
        _export,
    ),
    "verify": Command(
        "show that a deployed model decides like its checkpoint",
        "Compares files, metadata, raw scores and decisions on real images, and times the deployed model on this "
        "machine. Exit code 0 if all agrees and defects are found where images are labelled, else 1.",
        _verify_arguments,
        _verify,
    ),
    "watch": Command(
        "inference on images as they arrive",
        line.WATCH,
        line.add_arguments,
        line.run,
    ),
    "serve": Command("answer over HTTP", line.SERVE, line.add_serve_arguments, line.run_serve),
}
