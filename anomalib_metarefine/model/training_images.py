"""A look at the training images before a fit: which can't be read, which size they have, what is in them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from anomalib_metarefine.deploy.threshold import FEWEST_SCORES
from anomalib_metarefine.features.resize import suggested_size, usual_size
from anomalib_metarefine.images.reading import check_images, header_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anomalib.data import AnomalibDataModule, Batch
    from lightning.pytorch import LightningModule, Trainer

logger = logging.getLogger(__name__)

_SQUASH_WARNING = 1.25  # change of aspect ratio from which on we tell the user


class TrainingImages(Callback):
    """Leaves unreadable images out of a training run; the user's datamodule and trainer get back what was theirs.

    They get it back when the training dataloader has been made, when the run ends, and when it fails, whatever the
    reason: it is a callback because Lightning tells callbacks of exceptions, and models not.

    Attributes:
        hashes (dict[str, str]): SHA-256 of the readable images, by path.
        unreadable (dict[str, str]): Reason, by path, for the others.
        variants (dict[str, str]): Column ``variant`` of the datamodule's samples, by path, if there is one.
    """

    def __init__(self) -> None:
        self.variants: dict[str, str] = {}
        self.hashes: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self._train_data: Any = None
        self._limit_val_batches: int | float | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:  # noqa: ANN401
        """Read all training images once.

        Raises:
            ValueError: If there are none, or none can be read.
        """
        datamodule = trainer.datamodule
        if stage != "fit" or datamodule is None:
            return
        if not hasattr(datamodule, "val_data") and hasattr(datamodule, "val_split_mode"):
            # With val_split_mode none, anomalib's val_dataloader asks for a data set that it has not made.
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        train_data = getattr(datamodule, "train_data", None)
        if pl_module.is_fitted or train_data is None:
            return
        paths = [str(path) for path in train_data.samples["image_path"]]
        if "variant" in train_data.samples:
            self.variants = dict(zip(paths, map(str, train_data.samples["variant"]), strict=True))
        self._check(paths, datamodule.name, pl_module.bit_depth)
        pl_module.training_images = self.hashes
        if self.unreadable:
            readable = [i for i, path in enumerate(paths) if path not in self.unreadable]
            self._train_data, datamodule.train_data = train_data, train_data.subsample(readable)
        if pl_module.size_follows_images:
            pl_module.resize_to(usual_size(list(self.hashes)))
            give_resize_to(datamodule)

    def _check(self, paths: Sequence[str], name: str, bit_depth: int | None) -> None:
        if not paths:
            msg = f"{name} has no training images. Check its path and its split settings."
            raise ValueError(msg)
        checked = check_images(paths, bit_depth)
        if checked.misread or len(paths) >= FEWEST_SCORES:  # anomalib's own test trains on five flat images
            checked.require_as_trained(len(paths))
        self.hashes, self.unreadable = checked.hashes, checked.unreadable
        if not self.hashes:
            first, reason = next(iter(self.unreadable.items()))
            msg = f"None of the {len(paths)} training images can be read. The first is {first} ({reason})."
            raise ValueError(msg)
        if self.unreadable:
            listing = "\n".join(f"  {path}: {reason}" for path, reason in self.unreadable.items())
            logger.warning("%d training images can't be read and are left out:\n%s", len(self.unreadable), listing)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the datamodule its full training set back: the training dataloader exists by now."""
        del pl_module
        self._give_back_data(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give all back."""
        del exception
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give all back."""
        del pl_module, stage
        self._give_back_data(trainer)
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def _give_back_data(self, trainer: Trainer) -> None:
        if self._train_data is not None:
            trainer.datamodule.train_data, self._train_data = self._train_data, None


def answers_about(paths: Sequence[str], hashes: Mapping[str, str], decided: Mapping[str, str]) -> dict[int, bool]:
    """What a person said about training images: whether to keep each, by its number in ``paths``.

    Args:
        paths (Sequence[str]): The training images.
        hashes (Mapping[str, str]): Their SHA-256, by path.
        decided (Mapping[str, str]): keep or reject, by SHA-256.

    Raises:
        ValueError: If there are decisions, and none is about any of the images.
    """
    found = {row: decided[hashes[path]] == "keep" for row, path in enumerate(paths) if hashes.get(path) in decided}
    if decided and not found:
        msg = (
            f"None of the {len(decided)} decisions is about one of the {len(paths)} training images: they are known by "
            "their content. Pass the decisions of this folder, or leave them out."
        )
        raise ValueError(msg)
    return found


def warn_if_squashed(batch: Batch) -> None:
    """Say so where a size that was asked for hides thin defects."""
    if not batch.image_path:
        return
    size = header_size(batch.image_path[0])
    if size is None:
        return
    height, width = size
    rows, columns = batch.image.shape[-2:]
    change = (width / height) / (columns / rows)
    if max(change, 1 / change) > _SQUASH_WARNING:
        suggestion = suggested_size(height, width, rows * columns)
        logger.warning(
            "Images of %d x %d pixels (height x width) are squashed to %d x %d, which hides thin defects. "
            "Set image_size to their shape, e.g. %s or a multiple.", height, width, rows, columns, suggestion,
        )  # fmt: skip


def give_resize_to(datamodule: AnomalibDataModule | None) -> None:
    """Have a datamodule resize as the model does now.

    anomalib's datamodules resize images before they make batches of them, to the size that the model has in their
    `setup`. A model that has another size afterwards would otherwise see images that were resized twice.
    """
    update = getattr(datamodule, "_update_augmentations", None)
    if update is not None:
        update()
