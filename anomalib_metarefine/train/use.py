"""Which images are trained on, and which are held out for the threshold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from anomalib_metarefine.deploy.threshold import FEWEST_SCORES
from anomalib_metarefine.settings import seed_for
from anomalib_metarefine.train.plan import CONFIDENCE, OURS

if TYPE_CHECKING:
    from anomalib_metarefine.curation.manifest import Manifest
    from anomalib_metarefine.train.plan import Plan

_HELD_OUT = 0.2  # of the kept images, where a model has no leave-one-out scores


def use_of_images(manifest: Manifest, plan: Plan) -> pd.DataFrame:
    """The images that are kept: ``image_path``, ``sha256``, ``use``, which is train or calibrate, and ``variant``.

    The variant is the user's name for it; empty where variants have none.

    Raises:
        ValueError: If there are too few.
    """
    rows = manifest.table[manifest.table.decision.isin(["keep", "review"] if plan.review == "keep" else ["keep"])]
    if rows.empty:
        msg = f"There is nothing to train on: {manifest.counts}, images for review: {plan.review}."
        raise ValueError(msg)
    use = np.full(len(rows), "train", dtype=object)
    if plan.model != OURS:
        count = held_out(len(rows), plan.false_alarm_rate)
        use[np.random.default_rng(seed_for(plan.seed, "held out")).permutation(len(rows))[:count]] = "calibrate"
    paths = [str(path) for path in manifest.paths(rows)]
    names = manifest.run.get("structure", {}).get("names") or []
    variant = [names[int(number)] for number in rows.variant] if names else ""
    return pd.DataFrame({"image_path": paths, "sha256": rows.sha256.to_numpy(), "use": use, "variant": variant})


def rejected_before(manifest: Manifest, images: pd.DataFrame) -> int:
    """How many images the rule rejected for the share of the kept ones that is held out.

    Some of them are normal, and would have had high scores: without them a threshold would promise too much.

    Args:
        manifest (Manifest): Of the curation.
        images (pd.DataFrame): See `use_of_images`.
    """
    rejected = (manifest.table.decision == "reject") & (manifest.table.decided_by == "rule")
    return round(float(rejected.sum() * (images.use == "calibrate").mean()))


def held_out(images: int, false_alarm_rate: float) -> int:
    """How many of the kept images a model without leave-one-out scores is not trained on, but calibrated.

    A fifth of them, at least the fewest that `calibrate` takes, and no more than promise the rate.

    Raises:
        ValueError: If too few are left to train on.

    Example:
        >>> held_out(60, 0.01), held_out(500, 0.01), held_out(5000, 0.01), held_out(500, 0.05)
        (20, 100, 299, 59)
    """
    if images < 2 * FEWEST_SCORES:
        msg = (
            f"{images} images are too few: {FEWEST_SCORES} are held out for the threshold, and as many must be left to "
            f"train on. Expected at least {2 * FEWEST_SCORES}; {OURS} needs none held out."
        )
        raise ValueError(msg)
    promise = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - false_alarm_rate))
    return min(max(FEWEST_SCORES, round(_HELD_OUT * images)), max(promise, FEWEST_SCORES))
