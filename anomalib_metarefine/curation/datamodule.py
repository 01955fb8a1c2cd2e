"""An anomalib datamodule whose training set is what a manifest keeps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from anomalib_metarefine.images.datamodules import load_datamodule, set_up_without_validation
from anomalib_metarefine.images.sources import absolute, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anomalib.data import AnomalibDataModule, Tabular

logger = logging.getLogger(__name__)


def curated_datamodule(
    images: Sequence[Path],
    test: AnomalibDataModule | str | Path | None = None,
    variants: Sequence[str] | None = None,
    **settings: Any,  # noqa: ANN401
) -> Tabular:
    """A datamodule that trains on some images, and tests on what another one tests on.

    Args:
        images (Sequence[Path]): To train on.
        test (AnomalibDataModule | str | Path | None): See `Manifest.datamodule`.
        variants (Sequence[str] | None): The user's name for the variant of each image, for ``variants="column"``.
        **settings (Any): Settings of `anomalib.data.Tabular`, with its ``name``; they win.

    Raises:
        ValueError: If the test set is synthetic.
    """
    from anomalib.data import Tabular

    samples = _samples(images, split="train")
    if variants is not None:
        samples["variant"] = list(variants)
    found: dict[str, Any] = {"test_split_mode": "none", "val_split_mode": "none"}
    if test is not None:
        held_out, found = _test_samples(load_datamodule(test) if isinstance(test, str | Path) else test)
        both = set(samples.image_path) & set(held_out.image_path)
        if both:
            logger.warning("%d test images are training images too: %s.", len(both), listing(sorted(both)))
        samples = pd.concat([samples, held_out], ignore_index=True)
    return Tabular(**{"samples": samples, **found, **settings})


def copies(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Where `apply` put the images; those for review may lie with the kept ones."""
    found = []
    for row in rows.itertuples():
        own, with_kept = (folder / name / row.image_path for name in (row.decision, "keep"))
        found.append(own if own.exists() else with_kept)
    missing = [str(path) for path in found if not path.exists()]
    if missing:
        msg = f"{len(missing)} of {len(found)} images are not in {folder}: {listing(missing)}. "
        raise FileNotFoundError(msg + "Expected what `apply` wrote with mode 'repair' or 'copy' from this manifest.")
    return found


def _samples(paths: Iterable[Path | str], split: str, label: object = 0, mask: object = "") -> pd.DataFrame:
    """Rows as `anomalib.data.Tabular` takes them; label 0 is normal."""
    listed = [str(absolute(path)) for path in paths]
    return pd.DataFrame({"image_path": listed, "label_index": label, "mask_path": mask, "split": split})


def _test_samples(datamodule: AnomalibDataModule) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The test rows of a datamodule, and its settings that a Tabular has too."""
    from anomalib.data.utils import TestSplitMode, ValSplitMode

    if datamodule.test_split_mode == TestSplitMode.SYNTHETIC:
        msg = (
            f"The test set of {datamodule.name} is synthetic and vanishes with it. Pass one with test images in files."
        )
        raise ValueError(msg)
    source = set_up_without_validation(datamodule).test_data
    masks = source.samples.get("mask_path", pd.Series("", source.samples.index)).fillna("").astype(str)
    samples = _samples(source.samples.image_path, "test", source.samples.label_index.to_numpy(), masks.to_numpy())
    shared = ["train_batch_size", "eval_batch_size", "num_workers", "val_split_mode", "val_split_ratio", "seed"]
    shared += ["train_augmentations", "val_augmentations", "test_augmentations"]
    settings = {name: getattr(datamodule, name) for name in shared}
    if settings["val_split_mode"] == ValSplitMode.FROM_DIR:
        logger.warning("%s has a validation folder; the curated datamodule validates on the test set.", datamodule.name)
        settings["val_split_mode"] = ValSplitMode.SAME_AS_TEST
    # Where no normal test image is left, FROM_DIR would take some out of the training set.
    settings["test_split_mode"] = TestSplitMode.FROM_DIR if source.has_normal else TestSplitMode.NONE
    return samples, settings
