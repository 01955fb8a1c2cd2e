"""What a run found, for a person: a table, and a page in Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from anomalib_metarefine.train.plan import Plan, Step


def step_table(steps: dict[str, Step]) -> pd.DataFrame:
    """What each step found, and the seconds it took."""
    rows = [(name, "; ".join(_sentences(name, step.figures)), round(step.seconds, 1)) for name, step in steps.items()]
    return pd.DataFrame(rows, columns=["step", "result", "seconds"])


def page(plan: Plan, steps: dict[str, Step], curation: str) -> str:
    """All of it.

    Args:
        plan (Plan): What was asked for.
        steps (dict[str, Step]): All five.
        curation (str): Its folder.
    """
    problems = steps["verify"].figures["problems"]
    verdict = "**Verification failed.**" if problems else "The exported model decides like its checkpoint."
    return "\n".join([
        f"# {plan.model} from {plan.data or curation}", "", verdict, "",
        step_table(steps).to_markdown(index=False), "",
        "## How the images were used", "", _use(plan, steps["train"].figures), "",
        "## Files", "",
        f"- `{curation}`: what curation found, with its report",
        "- `images.csv`: every image that was used, and for what",
        "- `model.ckpt`: the checkpoint",
        "- `weights/openvino`: the exported model, with `metadata.json`", "",
        "## What was asked for", "", "```json", json.dumps(asdict(plan), indent=2), "```", "",
    ])  # fmt: skip


def _use(plan: Plan, figures: dict[str, Any]) -> str:
    if not figures["held_out"]:
        return (
            f"Trained on {figures['images']} images. The threshold comes from the score that each would have, had the "
            "model been trained without it."
        )
    return (
        f"Trained on {figures['images']} images. {figures['held_out']} others of those that were kept, drawn at "
        f"random, were held out for the threshold: for it, the scores of images that {plan.model} was trained on are "
        "too low."
    )


def _sentences(name: str, found: dict[str, Any]) -> list[str]:
    """The figures of a step for a person."""
    if name == "curate":
        counts = f"{found['keep']} of {found['images']} images kept, {found['reject']} rejected"
        return [f"{counts}, {found['review']} for review"]
    if name == "train":
        told = [f"{found['images']} images"]
        told += [f"{found['held_out']} held out for the threshold"] if found["held_out"] else []
        return told + ([f"{found['left_out']:.1%} of their patches left out"] if found.get("left_out") else [])
    if name == "calibrate":
        return [
            f"threshold {found['threshold']:.4g} from {found['images']} images, {found['set_aside']} set aside",
            f"false alarms {found['bound']:.1%} at most ({found['confidence']:.0%} confidence), "
            f"{found['false_alarm_rate']:.1%} asked for",
            f"{found['uncertain']:.1%} of normal images uncertain",
        ]
    if name == "export":
        return [f"{found['file']}, {found['precision']}, {found['megabytes']:.1f} MB"]
    told = [
        f"{found['images']} images, scores differ by {found['largest_difference']:.1g} relative at most",
        f"{found['latency_ms']['p50']:.1f} ms an image, {found['images_per_second']:.0f} a second",
    ]
    if found["auroc"]:
        told.append(f"image AUROC {found['auroc'][1]:.4f}")
    if found["detection"]:
        chosen = found["detection"]["chosen"]
        told.append(
            f"{chosen['found']} of {found['detection']['defective']} defective images found, "
            f"{chosen['false_alarms']} of {found['detection']['normal']} normal ones called anomalous"
        )
    return told + [f"PROBLEM: {problem}" for problem in found["problems"]]
