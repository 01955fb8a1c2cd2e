"""One training and one test with anomalib's Engine, and what they cost."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from statistics import median
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from lightning import seed_everything

from anomalib_metarefine.benchmark.images import MemoisedData, MemoisedImages
from anomalib_metarefine.benchmark.machine import PeakMemory
from anomalib_metarefine.benchmark.memo import frozen_networks
from anomalib_metarefine.benchmark.models import build, without_shortcuts
from anomalib_metarefine.model.make import length_of_training, sets_itself_in_validation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from anomalib.models.components import AnomalibModule

    from anomalib_metarefine.benchmark.config import BenchConfig
    from anomalib_metarefine.benchmark.memo import Memo
    from anomalib_metarefine.benchmark.models import ModelSpec

_TIMED, _WARM_UP = 16, 2  # images


def train_and_test(
    spec: ModelSpec,
    backbone: str,
    layers: Sequence[str] | None,
    train: pd.DataFrame,
    test: pd.DataFrame,
    image_size: tuple[int, int],
    seed: int,
    memo: Memo,
) -> tuple[dict[str, float], list[str] | None]:
    """Train a model on some images, and test it on others.

    Args:
        spec (ModelSpec): The model.
        backbone (str): See `build`.
        layers (Sequence[str] | None): See `build`.
        train (pd.DataFrame): anomalib's table of the training images.
        test (pd.DataFrame): anomalib's table of the test images. Pixel figures are made if every defective image has
            a mask.
        image_size (tuple[int, int]): Height and width.
        seed (int): Of everything random in the model and in the order of its images.
        memo (Memo): Images and features seen before.

    Returns:
        tuple[dict[str, float], list[str] | None]: Figures and costs by their columns in `table.Row`, the same, but for
            the seconds, whatever the memo holds; and the training images that the model's own refinement left out,
            ``None`` if it has none.

    Raises:
        ValueError: If the model can't be built, or does not know when to stop training.
        RuntimeError: If it needs a download that can't be had.
    """
    memory = PeakMemory(kept=lambda: memo.nbytes)
    seed_everything(seed, verbose=False)
    model = build(spec, backbone, layers, image_size, memo)
    data = MemoisedData(train, test, spec.batch_size, image_size, memo)
    with tempfile.TemporaryDirectory(prefix="metarefine-bench-") as folder:
        engine = Engine(
            default_root_dir=folder,
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[ModelCheckpoint(save_top_k=0)],  # or the Engine would write every model to disk
            # Some models set a part of themselves in validation; to others it is of no use.
            limit_val_batches=1.0 if sets_itself_in_validation(model) else 0,
            **length_of_training(model, spec.max_epochs, spec.max_steps, f"max_epochs or max_steps of {spec.name}"),
        )
        memo.restart()
        begin, shared = time.perf_counter(), memo.seconds
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars of models have no switch
                engine.fit(model, datamodule=data)
        except URLError as error:
            msg = f"{type(model).__name__} needs a download that can't be had here: {error.reason}"
            raise RuntimeError(msg) from error
        fit_seconds = time.perf_counter() - begin - (memo.seconds - shared)
        feature_seconds = memo.feature_seconds
        model.to(engine.trainer.strategy.root_device)
        images_per_second = _images_per_second(model, test.image_path.astype(str).tolist())
        peak = memory.growth()
        begin, shared = time.perf_counter(), memo.seconds
        engine.test(model, datamodule=data, verbose=False)
        test_seconds = time.perf_counter() - begin - (memo.seconds - shared)
    refinement = getattr(model, "refinement", None)
    figures = {
        **model.evaluator.figures,
        "fit_seconds": fit_seconds,
        "feature_seconds": feature_seconds,
        "test_seconds": test_seconds,
        "images_per_second": images_per_second,
        "peak_memory_mb": peak,
        "model_mb": sum(part.nbytes for part in [*model.model.parameters(), *model.model.buffers()]) / 1e6,
    }
    return figures, None if refinement is None else list(refinement.rejected)


def embed(
    samples: pd.DataFrame, specs: Iterable[ModelSpec], config: BenchConfig, image_size: tuple[int, int], memo: Memo
) -> None:
    """Fill a memo with the images and masks of a table of anomalib's, and their features for some models."""
    networks = {}
    for spec in specs:
        try:
            model = build(spec, config.backbone, config.layers, image_size, memo).eval()
        except (ValueError, RuntimeError):  # its cells say so
            continue
        for network in frozen_networks(model.model):
            features = network.forward
            networks[features.identity, tuple(features.names)] = (model.pre_processor.transform, features)
    for item in MemoisedImages(samples, image_size, memo):
        for transform, features in networks.values():
            features(transform(item.image.unsqueeze(0)))


@torch.inference_mode()
def _images_per_second(model: AnomalibModule, paths: Sequence[str]) -> float:
    """Predict some images, each by itself, as one who uses the model does; files are read before."""
    seconds = []
    model.eval()
    with without_shortcuts(model):
        for path in [*paths[:_WARM_UP], *paths[:_TIMED]]:
            image = read_image(path, as_tensor=True).unsqueeze(0).to(model.device)
            begin = time.perf_counter()
            model(image).pred_score.cpu()  # waits for a GPU
            seconds.append(time.perf_counter() - begin)
    return 1 / median(seconds[_WARM_UP:])


def quiet() -> None:
    """Keep hundreds of trainings from printing what anomalib and Lightning say about each."""
    for name in ("anomalib", "lightning", "lightning.pytorch", "lightning_fabric", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|timm")
