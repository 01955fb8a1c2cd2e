"""Add images to a trained model, and make it forget some, without the others at hand; see `memory` for what is exact.

References:
    Cao and Yang, "Towards Making Systems Forget with Machine Unlearning", IEEE S&P 2015.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from anomalib.post_processing import PostProcessor

from anomalib_metarefine.features.extract import image_tensor
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.images.reading import check_images
from anomalib_metarefine.images.sources import absolute
from anomalib_metarefine.model.calibration import FROM_TRAINING, calibrate_model
from anomalib_metarefine.model.checkpoints import KEY, additions, load_checkpoint, new_file, read_checkpoint
from anomalib_metarefine.model.export import calibration_in_force, data_hashes
from anomalib_metarefine.model.outcome import Update
from anomalib_metarefine.model.refit import change, fit_all_anew, fit_standing
from anomalib_metarefine.progress import progress_bars
from anomalib_metarefine.refinement.fitting import image_scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anomalib.models import AnomalibModule

    from anomalib_metarefine.model.memory import Memory
    from anomalib_metarefine.model.refit import Changed, Fit
    from anomalib_metarefine.refinement.rounds import Refinement

logger = logging.getLogger(__name__)

_FEWEST_DIGITS = 8  # of a hash
_BATCH = 16  # images in the backbone


def update(
    model: AnomalibModule,
    add: Iterable[str | Path] = (),
    forget: Iterable[str | Path] = (),
    answers: Mapping[str, bool] | None = None,
    reconsider: bool = False,
    progress: bool = False,
    variants: Mapping[str, str] = MappingProxyType({}),
) -> Update:
    """Add images to a trained model, and make it forget some.

    Args:
        model (AnomalibModule): A trained MetaRefine with a memory. It is changed; left as it was if this fails.
        add (Iterable[str | Path]): Image files. Those that the model knows by their content, or was once told to
            forget, are skipped, and so are unreadable ones.
        forget (Iterable[str | Path]): Training images by path, end of a path or SHA-256; the files need not exist.
        answers (Mapping[str, bool] | None): Images, by path, that a person has decided to keep (true) or to reject.
        reconsider (bool): Judge all images anew, in rounds, as the training did; else old decisions stand.
        progress (bool): Show bars.
        variants (Mapping[str, str]): The user's name for the variant of new images, by path; where the training had
            names. Otherwise the folder that an image lies in names it, as in the training (`variant_names`).

    Returns:
        Update: What was done.

    Raises:
        ValueError: If the model has no memory, an image to forget is unknown, or no image would be left.
    """
    memory, refinement = remembered(model)
    gone = known_images(model, forget)
    answers = _past_answers(model, gone) | {str(path): keep for path, keep in (answers or {}).items()}
    hashes, skipped = _new_images(model, list(dict.fromkeys(map(str, add))), gone, answers)
    new = embed_files(model, list(hashes), progress)
    skipped |= new.left_out

    rows = np.array([i for i, path in enumerate(refinement.paths) if path not in gone], dtype=int)
    likelihood = [model.left_out_scores[i] for i in rows]
    if len(new):
        maps = model.model.scorer(new.images().to(model.device)).detach().cpu()
        likelihood += image_scores(maps, model.settings.tail).tolist()
    named = variant_names(model, new.paths, variants)
    changed = change(
        memory, refinement.paths, np.array(refinement.kept), rows, new, np.array(likelihood), answers, skipped, named
    )
    flow, fit_images = copy.deepcopy(model.model.flow).cpu(), fit_all_anew if reconsider else fit_standing
    with progress_bars(enabled=progress) as bars, torch.inference_mode(mode=False), torch.enable_grad():
        fit = fit_images(changed, flow, model.settings, model.provenance["seed"], bars)
    return _take_over(model, changed, fit, hashes, gone, skipped, reconsider)


def known_images(model: AnomalibModule, names: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of training images, by path.

    Args:
        model (AnomalibModule): A trained model.
        names (Iterable[str | Path]): Path, end of a path, or at least 8 digits of the SHA-256, of one image each.

    Raises:
        ValueError: If one is unknown, or could be several images.
    """
    hashes = {path: model.training_images.get(path, "") for path in model.refinement.paths}
    found = {}
    for name in map(str, names):
        matching = [name] if name in hashes else [
            path for path, sha256 in hashes.items()
            if path.endswith(f"/{name}") or (len(name) >= _FEWEST_DIGITS and sha256.startswith(name.lower()))
        ]  # fmt: skip
        contents = {hashes[path] or path for path in matching}
        if len(contents) != 1:
            what = f"could be {len(matching)} of" if matching else "is none of"
            msg = f"{name} {what} the {len(hashes)} images that the model knows, such as {next(iter(hashes))}."
            raise ValueError(msg + " Name one by its path, the end of it, or its SHA-256.")
        found.update({path: hashes[path] for path in matching})
    return found


def variant_names(model: AnomalibModule, paths: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """Names of the variants of new images, by path, as far as they are known.

    Args:
        model (AnomalibModule): A trained model.
        paths (Iterable[str]): New images.
        given (Mapping[str, str]): What the user says, by path.

    Returns:
        dict[str, str]: Where the training had names: what the user says; else the longest known name that the path of
            the image's folder ends in; else, for images beside those of a training by folders, their folder.
    """
    names, found = sorted(model.memory.names, key=len, reverse=True), {}
    if not names:
        return {}
    common = Path(os.path.commonpath([absolute(path).parent for path in model.refinement.paths]))
    for path in paths:
        folder = absolute(path).parent
        known = given.get(path) or next((name for name in names if folder.as_posix().endswith(f"/{name}")), None)
        if known is None and model.settings.variants == "folders" and folder.is_relative_to(common):
            known = folder.relative_to(common).as_posix()
        if known is not None:
            found[path] = known
    return found


@torch.no_grad()
def embed_files(model: AnomalibModule, paths: Sequence[str], progress: bool = False) -> FeatureStore:
    """Embeddings of readable image files, as the training would have them."""
    store = FeatureStore()
    model.eval()
    with progress_bars(enabled=progress) as bars:
        task = bars.add_task("features", total=len(paths))
        for start in range(0, len(paths), _BATCH):
            part = paths[start : start + _BATCH]
            images = torch.stack([model.pre_processor.transform(image_tensor(path, model.bit_depth)) for path in part])
            store.add(part, model.model.embed(images.to(model.device))[0])
            bars.update(task, advance=len(part))
    return store


def update_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    add: Iterable[str | Path] = (),
    forget: Iterable[str | Path] = (),
    answers: Mapping[str, bool] | None = None,
    reconsider: bool = False,
    variants: Mapping[str, str] = MappingProxyType({}),
) -> Update:
    """Write a copy of a checkpoint with an updated model, whole or not at all; see `update`.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: See `update`.
    """
    with new_file(out) as temporary:
        model = load_checkpoint(checkpoint)
        found = update(model, add, forget, answers, reconsider, progress=True, variants=variants)
        content = read_checkpoint(checkpoint)
        content["state_dict"], content[KEY] = model.state_dict(), additions(model)
        torch.save(content, temporary)
    return found


def remembered(model: AnomalibModule) -> tuple[Memory, Refinement]:
    """What a model remembers of its training images; ValueError if nothing."""
    memory, refinement = getattr(model, "memory", None), getattr(model, "refinement", None)
    if memory is None or refinement is None:
        msg = (
            f"This {type(model).__name__} does not remember its training images, so it can't be updated. "
            "Expected a trained MetaRefine with a remember_mb that holds them (docs/update.md). Train it again."
        )
        raise ValueError(msg)
    return memory, refinement


def _new_images(
    model: AnomalibModule, paths: list[str], gone: Mapping[str, str], answers: Mapping[str, bool]
) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of the images that can be added, and the reason for the others, by path."""
    checked = check_images(paths, model.bit_depth)
    known = {sha256: path for path, sha256 in model.training_images.items() if path not in gone}
    past = {sha256: entry["when"] for entry in history(model) for sha256 in entry["forgotten"].values()}
    past.update(dict.fromkeys(gone.values(), "now"))
    new, skipped = {}, dict(checked.unreadable)
    for path, sha256 in checked.hashes.items():
        if sha256 in known:
            skipped[path] = f"the model knows it, as {known[sha256]}"
        elif sha256 in past and not answers.get(path):
            skipped[path] = f"it was to be forgotten ({past[sha256]})"
        elif path in model.refinement.paths and path not in gone:
            skipped[path] = "the model knows another image by this path: name that one to forget"
        else:
            new[path] = sha256
            known[sha256] = path
    return new, skipped


def _past_answers(model: AnomalibModule, gone: Mapping[str, str]) -> dict[str, bool]:
    """What a person has decided in earlier updates about images that the model still knows, by path."""
    past: dict[str, bool] = {}
    for entry in history(model):
        added = {one["image_path"]: one["decision"] for one in entry["added"] if one["decided_by"] == "user"}
        changed = {} if entry["reconsidered"] else entry["changed"]  # else by the rule
        past |= {path: decision == "keep" for path, decision in (added | changed).items()}
    return {path: keep for path, keep in past.items() if path in model.refinement.paths and path not in gone}


def history(model: AnomalibModule) -> list[dict[str, Any]]:
    """The updates of a model, the first one first."""
    return model.provenance.get("history", [])


def _take_over(
    model: AnomalibModule,
    changed: Changed,
    fit: Fit,
    hashes: Mapping[str, str],
    gone: dict[str, str],
    skipped: dict[str, str],
    reconsidered: bool,
) -> Update:
    """Make the model what was fitted, and write down what was done."""
    before, paths, threshold = model.refinement, changed.paths, threshold_of(model)
    model.model.load_density(fit.density, fit.memory.grid)
    model.model.to(model.device)
    model.memory = fit.memory
    known = {**model.training_images, **hashes}
    model.training_images = {path: known[path] for path in paths if path in known}
    unusual = 1 - float(fit.memory.learned.numpy()[fit.kept].mean())
    model.refinement = replace(
        before, paths=paths, kept=fit.kept.tolist(), scores=fit.scores.tolist(), rounds=[], stop_reason="updated",
        unusual_patches=unusual,
    )  # fmt: skip
    model.left_out_scores = fit.likelihood.tolist()
    recalibrated = _recalibrate(model)
    decisions = np.where(fit.kept, "keep", "reject").tolist()
    was = dict(zip(before.paths, before.kept, strict=True))
    other = {path: decisions[i] for i, path in enumerate(paths) if was.get(path, fit.kept[i]) != fit.kept[i]}
    names = fit.memory.names
    images = pd.DataFrame(
        [
            (
                paths[i], hashes[paths[i]], fit.scores[i], decisions[i], "user" if i in changed.answers else "rule",
                names[fit.memory.variants[i]] if names else "",
                ("user" if i in changed.named else "likeness") if names else "",
            )
            for i in np.flatnonzero(changed.fresh)
        ],
        columns=["image_path", "sha256", "score", "decision", "decided_by", "variant", "variant_by"],
    ).sort_values("score", ascending=False, kind="stable", ignore_index=True)  # fmt: skip
    entry = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "added": images.drop(columns=["score", *([] if names else ["variant", "variant_by"])]).to_dict("records"),
        "forgotten": gone,
        "changed": other,
        "reconsidered": reconsidered,
        "threshold": [threshold, threshold_of(model)],
        "drift": round(fit.memory.drift(fit.kept), 5),
    }
    past = [*history(model), entry]
    model.provenance |= data_hashes(model.refinement, model.training_images)
    model.provenance |= {"variants": fit.density.variants, "history": past}
    moved = sum(len(one["added"]) + len(one["forgotten"]) for one in past) / fit.memory.trained
    added = {image["sha256"] for one in past for image in one["added"]}
    forgotten = {sha256 for one in past for sha256 in one["forgotten"].values()} - added
    return Update(
        images, gone, other, skipped, int(fit.kept.sum()), (threshold, threshold_of(model)), recalibrated,
        entry["drift"], moved, len(forgotten) / fit.memory.trained,
    )  # fmt: skip


def threshold_of(model: AnomalibModule) -> float:
    """Raw threshold of the image score; NaN if it has none."""
    has = isinstance(model.post_processor, PostProcessor)
    return model.post_processor.image_threshold.item() if has else float("nan")


def _recalibrate(model: AnomalibModule) -> bool:
    """Choose thresholds anew where they came from the training images; only there the images are at hand."""
    if not isinstance(model.post_processor, PostProcessor):
        return False
    found = calibration_in_force(model.calibration, model.post_processor)
    if found is None or found["source"] != FROM_TRAINING:
        return False
    try:
        calibrate_model(model, false_alarm_rate=found["false_alarm_rate"], confidence=found["confidence"])
    except ValueError as error:
        logger.warning("The threshold stays as it was: %s", error)
        return False
    return True
