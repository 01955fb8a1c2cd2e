"""Training sets of a benchmark: how dirty they are, and what curation makes of them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from anomalib.data import AnomalibDataModule

    from anomalib_metarefine.benchmark.config import BenchConfig
    from anomalib_metarefine.benchmark.data_sets import DataSet

_LEAST_DEFECTIVE = 10  # in the test set: with fewer, AUROC says nothing


class TooFewError(ValueError):
    """A contamination that a data set has not enough images for."""


@dataclass(frozen=True)
class Dirt:
    """How a training set is made dirty; see `Contaminated`."""

    protocol: str
    overlap: str
    contamination: float
    seed: int


class Curated(NamedTuple):
    """What our curation makes of N training images."""

    kept: np.ndarray  # [N] of bool, false for the rejected
    repaired: list[str]  # for each image, the one without its unusual regions; where it has none, itself


@dataclass
class TrainingSet:
    """One contaminated training set, its test set, and its curation, which is run when it is first asked for."""

    datamodule: AnomalibDataModule
    dirty: np.ndarray  # [N] of bool
    folder: Path  # for what the curation found, and repaired images
    curate: Callable[[list[str], Path], Curated]
    curation_seconds: float = float("nan")
    _curated: Curated | None = field(default=None, repr=False)

    @property
    def train(self) -> pd.DataFrame:
        """Samples of the training set."""
        return self.datamodule.train_data.samples

    @property
    def test(self) -> pd.DataFrame:
        """Samples of the test set."""
        return self.datamodule.test_data.samples

    @property
    def curated(self) -> Curated:
        """What the curation makes of it, in whatever process it was run."""
        if self._curated is None:
            known = self.folder / "curated.json"
            if not known.exists():
                begin = time.perf_counter()
                paths = self.train.image_path.astype(str).tolist()
                self.folder.mkdir(parents=True, exist_ok=True)
                kept, repaired = self.curate(paths, self.folder)
                content = {"kept": kept.tolist(), "repaired": repaired, "seconds": time.perf_counter() - begin}
                unfinished = known.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(content))
                unfinished.replace(known)
            content = json.loads(known.read_text())
            self._curated = Curated(np.array(content["kept"], dtype=bool), content["repaired"])
            self.curation_seconds = content["seconds"]
        return self._curated

    def select(self, training: str) -> tuple[pd.DataFrame, np.ndarray]:
        """What a training is on: samples of all ``N`` images as they are then, and an ``[N]`` mask of those used."""
        if training == "raw":
            return self.train, np.ones(len(self.train), dtype=bool)
        if training == "clean":
            return self.train, ~self.dirty
        if training == "repaired":
            return self.train.assign(image_path=self.curated.repaired), self.curated.kept
        return self.train, self.curated.kept


def curated_images(paths: Sequence[str], seed: int, data: DataSet, config: BenchConfig, folder: Path) -> Curated:
    """What `curate` makes of training images; those to review pass, since nobody has reviewed them."""
    from anomalib_metarefine.curation.apply import apply
    from anomalib_metarefine.curation.curate import curate

    manifest, evidence = curate(
        list(paths),
        backbone=config.backbone,
        layers=config.layers,
        image_size=data.image_size,
        seed=seed,
        quality=False,  # it looks for other things than defects and rejects nothing
        progress=False,
    )
    rejected = {path.resolve() for path in manifest.rejected}
    copies = {}
    if evidence.unusual_in:
        apply(manifest, folder / "repaired", "repair", review="keep", evidence=evidence)
        copies = {(manifest.root / name).resolve(): folder / "repaired/keep" / name for name in evidence.unusual_in}
    return Curated(
        np.array([Path(path).resolve() not in rejected for path in paths]),
        [str(copies.get(Path(path).resolve(), path)) for path in paths],
    )


def draw(data: DataSet, dirt: Dirt, folder: Path, curate: Callable[[list[str], Path], Curated]) -> TrainingSet:
    """A training set of a data set, as dirty as asked for.

    Args:
        data (DataSet): Is downloaded if it has to be.
        dirt (Dirt): How dirty.
        folder (Path): For what the curation finds.
        curate (Callable): What becomes of the paths of its images; may write into the folder.

    Raises:
        TooFewError: If the data set has too few images for that.
    """
    from anomalib_metarefine.data.contamination import Contaminated

    source = data.datamodule(dirt.seed)
    source.prepare_data()
    source.setup()
    images = data.train_images
    datamodule = Contaminated(source, dirt.contamination, dirt.overlap, dirt.seed, images, dirt.protocol)
    try:
        datamodule.setup()
    except ValueError as error:
        raise TooFewError(*error.args) from error
    found = TrainingSet(datamodule, datamodule.is_injected.to_numpy(), folder, curate)
    defective = int(found.test.label_index.sum())
    if defective < _LEAST_DEFECTIVE:
        msg = (
            f"With contamination {dirt.contamination:g}, {defective} defective images are left to test on, and "
            f"{_LEAST_DEFECTIVE} are needed. Ask for fewer training images."
        )
        raise TooFewError(msg)
    return found
