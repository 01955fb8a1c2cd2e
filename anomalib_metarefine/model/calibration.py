"""Thresholds of a trained model from normal images alone; the statistics are in ``deploy/threshold.py``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from anomalib.data.utils import read_image
from anomalib.post_processing import PostProcessor
from anomalib.utils.serialization import anomalib_safe_globals

from anomalib_metarefine.deploy.threshold import Calibration, calibrate
from anomalib_metarefine.images.reading import check_images
from anomalib_metarefine.progress import progress_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anomalib_metarefine.model.lightning_model import MetaRefine

logger = logging.getLogger(__name__)

_BATCH = 16  # images


class RawScores(NamedTuple):
    """Raw scores of images.

    Attributes:
        image (np.ndarray): Image scores ``[N]``.
        pixel (np.ndarray): Highest score in the anomaly map of each image ``[N]``.
    """

    image: np.ndarray
    pixel: np.ndarray


@torch.no_grad()
def raw_scores(
    model: MetaRefine,
    paths: Sequence[str | Path],
    progress: bool = False,
    change: Callable[[torch.Tensor], torch.Tensor] = lambda image: image,
) -> RawScores:
    """Score image files as anomalib does in testing, before its post-processor.

    Args:
        model (MetaRefine): A trained model.
        paths (Sequence[str | Path]): Readable image files, of any sizes.
        progress (bool): Show a bar.
        change (Callable): Done to each image ``[3, H, W]`` in [0, 1] before the model's pre-processing.
    """
    model.eval()
    image, pixel = [], []
    with progress_bars(enabled=progress) as bars:
        task = bars.add_task("scoring images", total=len(paths))
        for start in range(0, len(paths), _BATCH):
            part = paths[start : start + _BATCH]
            images = [model.pre_processor.transform(change(read_image(path, as_tensor=True))) for path in part]
            output = model.model(torch.stack(images).to(model.device))
            image.append(output.pred_score.cpu())
            pixel.append(output.anomaly_map.amax((1, 2, 3)).cpu())
            bars.update(task, advance=len(part))
    return RawScores(torch.cat(image).double().numpy(), torch.cat(pixel).double().numpy())


def calibrate_model(
    model: MetaRefine,
    paths: Sequence[str | Path] | None = None,
    false_alarm_rate: float = 0.01,
    confidence: float = 0.95,
    progress: bool = False,
) -> Calibration:
    """Give a model's post-processor thresholds for a stated share of false alarms.

    Args:
        model (MetaRefine): A trained model; its thresholds and normalisation are replaced, and `MetaRefine.calibration`
            is set.
        paths (Sequence[str | Path] | None): Images taken as normal; up to a tenth may be defective. Those of the
            training are left out, since the model knows them, and so are unreadable ones, both with a warning. At most
            ``false_alarm_rate`` of normal images is then called anomalous, and at most as many have any pixel in their
            mask. ``None`` takes the leave-one-out scores of the training images that refinement kept, which are those
            of unseen images within the noise (docs/threshold.md); the mask's threshold is then that of the score.
        false_alarm_rate (float): See `calibrate`.
        confidence (float): See `calibrate`.
        progress (bool): Show a bar.

    Returns:
        Calibration: Of the image scores.

    Raises:
        ValueError: If the model has no post-processor of anomalib's that could hold a threshold, if its training scores
            are no leave-one-out scores, or if `calibrate` finds the images too few or too much alike.
    """
    if not isinstance(model.post_processor, PostProcessor):
        msg = "The model has no post-processor that could hold a threshold. Train it with post_processor=True."
        raise ValueError(msg)
    if paths is None:
        scores, rejected = _training_scores(model)
        image = pixel = calibrate(scores, false_alarm_rate, confidence, left_out=rejected)
        source = "leave-one-out scores of the training images"
    else:
        scores = raw_scores(model, _usable(model, paths), progress)
        image, pixel = (calibrate(values, false_alarm_rate, confidence) for values in scores)
        source = "images that the model was not trained on"
    for name, found in (("image", image), ("pixel", pixel)):
        buffers = {f"_{name}_threshold": found.threshold, f"{name}_min": found.minimum, f"{name}_max": found.maximum}
        for buffer, value in buffers.items():
            getattr(model.post_processor, buffer).fill_(value)
    model.calibration = {"threshold": image.threshold, **image.to_dict(), "source": source}
    return image


def calibrate_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    paths: Sequence[str | Path] | None = None,
    false_alarm_rate: float = 0.01,
    confidence: float = 0.95,
) -> Calibration:
    """Write a copy of a checkpoint with calibrated thresholds; everything else in it stays as it is.

    Args:
        checkpoint (str | Path): Of a trained MetaRefine.
        out (str | Path): File to write; it must not exist.
        paths (Sequence[str | Path] | None): See `calibrate_model`.
        false_alarm_rate (float): See `calibrate`.
        confidence (float): See `calibrate`.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: See `calibrate_model`.
    """
    out = Path(out)
    if out.exists():
        msg = f"{out} exists. Pass another file as --out; nothing is overwritten."
        raise FileExistsError(msg)
    model = load_model(checkpoint)
    found = calibrate_model(model, paths, false_alarm_rate, confidence, progress=True)
    with anomalib_safe_globals(extra=model.checkpoint_safe_globals()):
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    states = {f"post_processor.{name}": value for name, value in model.post_processor.state_dict().items()}
    content["state_dict"].update(states)
    model.on_save_checkpoint(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, out)
    return found


def load_model(checkpoint: str | Path) -> MetaRefine:
    """A trained model, ready to score.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a trained MetaRefine.
    """
    from anomalib_metarefine.model.lightning_model import MetaRefine

    if not Path(checkpoint).is_file():
        msg = f"There is no checkpoint {checkpoint}."
        raise FileNotFoundError(msg)
    try:
        model = MetaRefine.load_from_checkpoint(checkpoint, map_location="cpu")
    except Exception as error:  # whatever unpickling and Lightning raise for another file
        msg = f"{checkpoint} is not a checkpoint of MetaRefine that this version reads: {error}"
        raise ValueError(msg) from error
    if model.model.scorer.patches == 0:
        msg = f"The model in {checkpoint} has not been trained."
        raise ValueError(msg)
    return model.eval()


def _training_scores(model: MetaRefine) -> tuple[np.ndarray, int]:
    """Leave-one-out scores of the kept training images, and how many were rejected."""
    if model.refinement is None:
        msg = "The model does not know the scores of its training images. Pass images to calibrate on."
        raise ValueError(msg)
    if model.settings.shrinkage == 1:
        msg = "With shrinkage=1 the leave-one-out scores of the training are too low. Pass images to calibrate on."
        raise ValueError(msg)
    kept = np.array(model.refinement.kept)
    return np.array(model.refinement.parts["likelihood"])[kept], int((~kept).sum())


def _usable(model: MetaRefine, paths: Sequence[str | Path]) -> list[str]:
    known = {str(Path(path).resolve()) for path in model.refinement.paths} if model.refinement else set()
    new = [path for path in paths if str(Path(path).resolve()) not in known]
    if len(new) < len(paths):
        logger.warning("%d images are left out: the model was trained on them.", len(paths) - len(new))
    checked = check_images(new)
    for path, reason in checked.unreadable.items():
        logger.warning("%s is left out: %s", path, reason)
    return list(checked.hashes)
