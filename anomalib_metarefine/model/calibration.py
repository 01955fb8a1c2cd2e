"""Thresholds of a trained model from normal images alone; the statistics are in ``deploy/threshold.py``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from anomalib.post_processing import PostProcessor

from anomalib_metarefine.deploy.threshold import Calibration, calibrate, check_settings
from anomalib_metarefine.features.extract import image_tensor
from anomalib_metarefine.images.reading import check_images
from anomalib_metarefine.model.checkpoints import KEY, additions, load_checkpoint, new_file, read_checkpoint
from anomalib_metarefine.model.evaluation import Detection, detect
from anomalib_metarefine.model.ignoring import ignore_regions
from anomalib_metarefine.progress import progress_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anomalib.models import AnomalibModule

    from anomalib_metarefine.refinement.rounds import Refinement

logger = logging.getLogger(__name__)

FEW_LEFT_OUT = 60  # training images; with fewer, what left-out scores promise is not kept (docs/threshold.md)
_BATCH = 16  # images
FROM_TRAINING = "leave-one-out scores of the training images"


class RawScores(NamedTuple):
    """Raw scores of images.

    Attributes:
        image (np.ndarray): Image scores ``[N]``.
        pixel (np.ndarray | None): Highest score in the anomaly map of each image ``[N]``, if the model makes maps.
    """

    image: np.ndarray
    pixel: np.ndarray | None


class CalibratedModel(NamedTuple):
    """What calibrating a model gave.

    Attributes:
        calibration (Calibration): Of the image scores.
        detection (Detection | None): What the threshold finds, if images were labelled. Its false alarms are those
            among the very images that were calibrated on.
    """

    calibration: Calibration
    detection: Detection | None


@torch.no_grad()
def raw_scores(
    model: AnomalibModule,
    paths: Sequence[str | Path],
    progress: bool = False,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda image: image,
) -> RawScores:
    """Score image files as anomalib does in testing, before its post-processor.

    Args:
        model (AnomalibModule): A trained model.
        paths (Sequence[str | Path]): Readable image files, of any sizes.
        progress (bool): Show a bar.
        change (Callable): Done to each image ``[3, H, W]`` in [0, 1] before the model's pre-processing.
    """
    model.eval()
    transform = getattr(model.pre_processor, "transform", None) or (lambda image: image)
    image, pixel = [], []
    with progress_bars(enabled=progress) as bars:
        task = bars.add_task("scoring images", total=len(paths))
        for start in range(0, len(paths), _BATCH):
            part = paths[start : start + _BATCH]
            images = [image_tensor(path, getattr(model, "bit_depth", None)) for path in part]
            images = [transform(change(image)) for image in images]
            output = model.model(torch.stack(images).to(model.device))
            highest = None if output.anomaly_map is None else output.anomaly_map.flatten(1).amax(1)
            scores = highest if output.pred_score is None else output.pred_score.flatten()
            image.append(scores.cpu())
            pixel.append(highest if highest is None else highest.cpu())
            bars.update(task, advance=len(part))
    return RawScores(_joined(image), None if any(part is None for part in pixel) else _joined(pixel))


def _joined(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).double().numpy()


def set_thresholds(
    post_processor: PostProcessor,
    scores: RawScores,
    false_alarm_rate: float = 0.01,
    confidence: float = 0.95,
    left_out: int = 0,
) -> Calibration:
    """Give a post-processor thresholds and normalisation for a stated share of false alarms.

    Args:
        post_processor (PostProcessor): It is changed.
        scores (RawScores): Of images taken as normal. At most ``false_alarm_rate`` of normal images is then called
            anomalous, and at most as many have any pixel in their mask. Without scores of pixels, the mask's threshold
            is that of the image score.
        false_alarm_rate (float): See `calibrate`.
        confidence (float): See `calibrate`.
        left_out (int): See `calibrate`.

    Returns:
        Calibration: Of the image scores.

    Raises:
        ValueError: If it is no post-processor of anomalib's, or see `calibrate`.
    """
    if not isinstance(post_processor, PostProcessor):
        msg = "The model has no post-processor that could hold a threshold. Train it with post_processor=True."
        raise ValueError(msg)
    image = pixel = calibrate(scores.image, false_alarm_rate, confidence, left_out=left_out)
    if scores.pixel is not None:
        pixel = calibrate(scores.pixel, false_alarm_rate, confidence, left_out=left_out)
    for name, found in (("image", image), ("pixel", pixel)):
        buffers = {f"_{name}_threshold": found.threshold, f"{name}_min": found.minimum, f"{name}_max": found.maximum}
        for buffer, value in buffers.items():
            getattr(post_processor, buffer).fill_(value)
    return image


def kept_scores(left_out: Sequence[float], refinement: Refinement | None, shrinkage: float) -> tuple[RawScores, int]:
    """Leave-one-out scores of the training images that refinement kept, and how many it rejected.

    Args:
        left_out (Sequence[float]): Raw leave-one-out scores of all training images.
        refinement (Refinement | None): What was decided about them.
        shrinkage (float): That the density was fitted with.

    Raises:
        ValueError: If the model has none.
    """
    if refinement is None:
        msg = "The model does not know left-out scores of its training images. Pass normal images as --data."
        raise ValueError(msg)
    if shrinkage == 1:
        msg = "With shrinkage=1 the leave-one-out scores of the training are too low. Pass normal images as --data."
        raise ValueError(msg)
    kept = np.array(refinement.kept)
    return RawScores(np.array(left_out)[kept], None), int((~kept).sum())


def calibrate_model(
    model: AnomalibModule,
    paths: Sequence[str | Path] | None = None,
    anomalous: np.ndarray | None = None,
    false_alarm_rate: float = 0.01,
    confidence: float = 0.95,
    progress: bool = False,
    left_out: int = 0,
) -> CalibratedModel:
    """Give a model thresholds for a stated share of false alarms, and ``model.calibration``, which says how.

    Args:
        model (AnomalibModule): A trained model of anomalib or MetaRefine; thresholds and normalisation are replaced.
        paths (Sequence[str | Path] | None): Images taken as normal; up to a tenth may be defective. Those of the
            training are left out, wherever they lie, as far as the model knows them (MetaRefine does), and so are
            unreadable ones, both with a warning. ``None`` takes the leave-one-out scores of the training images
            that refinement kept, which only MetaRefine has (docs/threshold.md).
        anomalous (np.ndarray | None): ``[N]`` bool, where it is known: these images are not calibrated on, but counted
            in `Detection`.
        false_alarm_rate (float): See `calibrate`.
        confidence (float): See `calibrate`.
        progress (bool): Show a bar.
        left_out (int): See `calibrate`; of ``paths``.

    Raises:
        ValueError: If the model has no post-processor of anomalib's that could hold a threshold, no left-out scores and
            no images are given, none of them can be used, or `calibrate` finds them too few or too much alike.
    """
    check_settings(false_alarm_rate, confidence)
    detection = None
    if paths is None:
        shrinkage = getattr(getattr(model, "settings", None), "shrinkage", 0)
        known, refinement = getattr(model, "left_out_scores", []), getattr(model, "refinement", None)
        scores, rejected = kept_scores(known, refinement, shrinkage)
        found = set_thresholds(model.post_processor, scores, false_alarm_rate, confidence, rejected)
        if len(scores.image) < FEW_LEFT_OUT:
            logger.warning(
                "Left-out scores of %d training images can't carry a promise: with 40 it was broken in most trials, "
                "with 20 nearly all normal images were called anomalous. Calibrate on normal images that the model has "
                "not seen: metarefine calibrate CKPT --data DATA --out NEW.", len(scores.image),
            )  # fmt: skip
        source = FROM_TRAINING
    else:
        usable = unseen(paths, getattr(model, "training_images", {}), getattr(model, "bit_depth", None))
        known = np.zeros(len(usable), dtype=bool) if anomalous is None else np.asarray(anomalous)[usable]
        if known.all():
            msg = f"All {len(usable)} images are labelled as defective. Calibration needs normal ones."
            raise ValueError(msg)
        scores = raw_scores(model, [paths[i] for i in usable], progress)
        normal = RawScores(scores.image[~known], None if scores.pixel is None else scores.pixel[~known])
        found = set_thresholds(model.post_processor, normal, false_alarm_rate, confidence, left_out)
        detection = None if anomalous is None else detect(scores.image, known, found.threshold)
        source = "images that the model was not trained on"
        if not getattr(model, "training_images", {}):
            source = "images given as not trained on; the checkpoint does not know its training images"
    model.calibration = {"threshold": found.threshold, **found.to_dict(), "source": source}
    return CalibratedModel(found, detection)


def unseen(paths: Sequence[str | Path], training_images: Mapping[str, str], bit_depth: int | None = None) -> list[int]:
    """Which images can be read and are not those of the training, by their content.

    Args:
        paths (Sequence[str | Path]): Image files, or links to some.
        training_images (Mapping[str, str]): SHA-256 of the training images, by path.
        bit_depth (int | None): See `read_image`.

    Raises:
        ValueError: If none is left.
    """
    checked = check_images(paths, bit_depth)
    for path, reason in checked.unreadable.items():
        logger.warning("%s is left out: %s", path, reason)
    seen = set(training_images.values())
    readable = [i for i, path in enumerate(paths) if str(path) in checked.hashes]
    new = [i for i in readable if checked.hashes[str(paths[i])] not in seen]
    if len(new) < len(readable):
        logger.warning("%d images are left out: the model was trained on them.", len(readable) - len(new))
    if not new:
        msg = (
            f"None of the {len(paths)} images can be used: the model was trained on {len(readable) - len(new)}, and "
            f"{len(checked.unreadable)} can't be read. Pass normal images that it has not seen."
        )
        raise ValueError(msg)
    return new


def calibrate_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    paths: Sequence[str | Path] | None = None,
    anomalous: np.ndarray | None = None,
    false_alarm_rate: float = 0.01,
    confidence: float = 0.95,
    model: str | None = None,
    ignore: str | Path | None = None,
    left_out: int = 0,
) -> CalibratedModel:
    """Write a copy of a checkpoint with calibrated thresholds, whole or not at all; all else in it stays as it is.

    Arguments are those of `load_checkpoint` and `calibrate_model`, and regions that the copy ignores, see
    `ignore_regions`; for these, images are needed.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: See `calibrate_model`.
    """
    check_settings(false_alarm_rate, confidence)
    with new_file(out) as temporary:
        loaded = load_checkpoint(checkpoint, model)
        if ignore is not None:
            ignore_regions(loaded, ignore, paths or [])
        found = calibrate_model(loaded, paths, anomalous, false_alarm_rate, confidence, True, left_out)
        content = read_checkpoint(checkpoint)
        states = {f"post_processor.{name}": value for name, value in loaded.post_processor.state_dict().items()}
        content["state_dict"].update(states)
        content[KEY] = additions(loaded)
        torch.save(content, temporary)
    return found
