"""What the studies share: dirty training sets, features of a whole data set, the engine, tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.progress import Progress

from anomalib_metarefine.data.contamination import Contaminated
from anomalib_metarefine.density.patch_density import new_flow
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE, Backbone
from anomalib_metarefine.features.extract import Recipe, collect_features
from anomalib_metarefine.refinement.engine import Result, refine_images
from anomalib_metarefine.refinement.fitting import Images, fit_whitening, learn_initialisation
from anomalib_metarefine.settings import Settings, seed_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from anomalib_metarefine.benchmark.data_sets import DataSet
    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.features.embedding import Whitening
    from anomalib_metarefine.features.store import FeatureStore
    from anomalib_metarefine.meta.maml import Parameters

Features = tuple["FeatureStore", tuple[int, int]]  # embeddings, and rows and columns of patches


def dirty_set(data: DataSet, contamination: float, seed: int, images: int | None = None) -> Contaminated:
    """A training set with real defects in place of good images, which leave the test set.

    Args:
        data (DataSet): Where the images come from.
        contamination (float): Share of dirty training images, in [0, 1).
        seed (int): Draws the images.
        images (int | None): Of the training set; ``None`` takes as many as ``data`` says.

    Returns:
        Contaminated: Set up.

    Raises:
        ValueError: If there are not enough images.
    """
    size = images or data.train_images
    datamodule = Contaminated(data.datamodule(seed), contamination, "no-overlap", seed, size)
    datamodule.setup()
    return datamodule


def all_features(datamodule: Contaminated, data: DataSet) -> Features:
    """Features of every image of the source, whichever set it may be drawn for."""
    source = datamodule.datamodule
    source.setup()
    paths = [*source.train_data.samples.image_path, *source.test_data.samples.image_path]
    return features_of(paths, data)


def features_of(paths: Iterable[str], data: DataSet) -> Features:
    """Features of these images, in their order, at the size that the data set is read with."""
    files, backbone = [Path(path) for path in paths], Backbone(OFFLINE_BACKBONE)
    found = collect_features(files, Recipe(backbone, OFFLINE_BACKBONE, data.image_size), 4096)
    return found.store.of([str(path) for path in files]), found.grid


def begin(features: Features, seed: int, settings: Settings) -> tuple[Images, PatchFlow, Parameters]:
    """Images behind a whitening of their own, an untrained flow, and what meta-training makes of it."""
    store, grid = features
    flow = new_flow(store.shape[1], settings.dimensions, settings.blocks, settings.hidden, seed_for(seed, "flow"))
    images = Images(store, fit_whitening([store], flow.dimensions, seed), grid)
    return images, flow, learn_initialisation([images], flow, settings, seed, Progress(disable=True))


def refine(
    features: Features,
    seed: int,
    start: tuple[Whitening, PatchFlow, Parameters] | None = None,
    answers: Mapping[int, bool] | None = None,
    **changes: Any,  # noqa: ANN401
) -> Result:
    """The engine on these features, without bars; ``changes`` are settings that differ from the defaults."""
    return refine_images(*features, Settings(**changes), seed, Progress(disable=True), start=start, answers=answers)


def add_grid(parser: argparse.ArgumentParser, contamination: Sequence[float]) -> None:
    """The arguments of studies that go through dirty training sets."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="CSV that rows are added to; finished ones stay")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="WHERE[@HxW][:IMAGES][:NAME]", help="elpv-mono, say"
    )
    add("--contamination", type=float, nargs="+", default=contamination, help="shares of dirty images")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a training set for each")


def finished(out: Path, key: list[str]) -> set[tuple]:
    """Keys of the rows that are in a result file already."""
    return set(pd.read_csv(out)[key].itertuples(index=False, name=None)) if out.is_file() else set()


def record(rows: Iterable[dict[str, object] | str], out: Path) -> None:
    """Append rows to a CSV file as they come, and print them; a text is printed only."""
    for row in rows:
        if isinstance(row, str):
            print(row, flush=True)
            continue
        if out.is_file() and (columns := pd.read_csv(out, nrows=0).columns.tolist()) != list(row):
            msg = f"{out} has the columns {columns}, expected {list(row)}. Pass another --out."
            raise ValueError(msg)
        pd.DataFrame([row]).to_csv(out, mode="a", header=not out.is_file(), index=False)
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()), flush=True)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    return pd.DataFrame(list(rows), columns=list(header)).to_markdown(index=False, disable_numparse=True)


def spread(values: pd.Series, places: int) -> str:
    """Mean ± standard deviation of what is not missing; empty without any."""
    values = values.dropna()
    if values.empty:
        return ""
    return f"{values.mean():.{places}f}" + (f" ± {values.std():.{places}f}" if len(values) > 1 else "")
