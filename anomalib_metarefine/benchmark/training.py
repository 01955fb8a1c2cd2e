"""One training and one test with anomalib's Engine."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from typing import TYPE_CHECKING, NamedTuple

from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.engine import Engine
from lightning import seed_everything
from torch.utils.data import DataLoader

from anomalib_metarefine.benchmark.memo import Memo, MemoisedImages
from anomalib_metarefine.benchmark.others import RECIPES, build

if TYPE_CHECKING:
    import pandas as pd

_EVAL_BATCH = 32  # images


class Trained(NamedTuple):
    """What one training gave: image AUROC on the test set, and seconds of fitting."""

    image_auroc: float
    seconds: float


def train_and_test(
    name: str, train: pd.DataFrame, test: pd.DataFrame, image_size: tuple[int, int], seed: int, memo: Memo
) -> Trained:
    """Train a model on some images, and test it on others.

    Args:
        name (str): A key of `RECIPES`.
        train (pd.DataFrame): Training samples, with ``image_path`` and ``label_index``.
        test (pd.DataFrame): Test samples.
        image_size (tuple[int, int]): Height and width.
        seed (int): Of everything random in the model and in the order of its images.
        memo (Memo): Images and features seen before.

    Returns:
        Trained: Image AUROC and seconds.
    """
    seed_everything(seed, verbose=False)
    model = build(name, image_size, memo)
    batches = {"num_workers": 0, "collate_fn": MemoisedImages.collate_fn}
    training = DataLoader(
        MemoisedImages(train, image_size, memo), batch_size=RECIPES[name].batch_size, shuffle=True, **batches
    )
    testing = DataLoader(MemoisedImages(test, image_size, memo), batch_size=_EVAL_BATCH, **batches)
    with tempfile.TemporaryDirectory(prefix="metarefine-transfer-") as folder:
        engine = Engine(
            default_root_dir=folder,
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[ModelCheckpoint(save_top_k=0)],  # or the Engine would write every model to disk
        )
        begin = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # PatchCore's progress bar has no switch
            engine.fit(model, train_dataloaders=training)
        seconds = time.perf_counter() - begin
        (metrics,) = engine.test(model, dataloaders=testing, verbose=False)
    return Trained(float(metrics["image_RankAUROC"]), seconds)


def hush() -> None:
    """Keep hundreds of trainings from printing what anomalib and Lightning say about each."""
    for name in ("anomalib", "lightning", "lightning.pytorch", "lightning_fabric", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|timm")
