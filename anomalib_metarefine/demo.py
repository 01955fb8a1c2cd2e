"""`metarefine demo`: raw, refined and truly clean training side by side, on real images with real defects."""

from __future__ import annotations

import logging
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, Folder
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from anomalib_metarefine.data.contamination import Contaminated
from anomalib_metarefine.data.elpv import ELPV
from anomalib_metarefine.model.lightning_model import MetaRefine
from anomalib_metarefine.refinement.rounds import Refinement

mpl.use("Agg")
from matplotlib import pyplot as plt

_GALLERY = 8  # images
_KEPT, _DIRTY, _FENCE = "#0072B2", "#D55E00", "#000000"  # Okabe and Ito's palette: safe for colour-blind readers


@dataclass(frozen=True)
class DemoSettings:
    """Options of the command; see ``metarefine demo --help``."""

    out: Path
    cell_type: str
    mvtec: Path | None
    image_size: tuple[int, int]
    contamination: float
    train_images: int
    seeds: list[int]
    training: list[str]
    rule: str


def run_demo(settings: DemoSettings) -> pd.DataFrame:
    """Run everything, print the table, write ``results.csv``, pictures and the checkpoint of the refined model.

    Args:
        settings (DemoSettings): What to run.

    Returns:
        pd.DataFrame: One row per seed and training set: image AUROC, images rejected, precision and recall of the
            rejection, seconds of training.
    """
    console = Console()
    started = time.perf_counter()
    for name in ("anomalib", "anomalib_metarefine", "lightning", "lightning.pytorch", "lightning_fabric", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|timm")
    settings.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in settings.seeds:
        datamodule = Contaminated(
            _source(settings, seed), settings.contamination, "no-overlap", seed, settings.train_images
        )
        # As a trainer does it: otherwise the first training would set it up again, and undo the choice of images.
        datamodule.setup(TrainerFn.FITTING)
        console.print(
            f"[bold]{datamodule.name} {datamodule.category}[/], seed {seed}: {len(datamodule.train_data)} training "
            f"images, {len(datamodule.injected)} of them dirty; {len(datamodule.test_data)} test images"
        )
        for kind in settings.training:
            console.print(f"[bold]{kind}[/]")
            rows.append({"seed": seed, "training": kind, **_train(kind, datamodule, settings, seed)})
    table = pd.DataFrame(rows)
    table.to_csv(settings.out / "results.csv", index=False)
    _print(console, table)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
    console.print(f"{versions}; {time.perf_counter() - started:.0f} s in all")
    console.print(f"Table, pictures and checkpoint are in [bold]{settings.out.resolve()}[/]:")
    for path in sorted(p for p in settings.out.iterdir() if p.is_file()):
        console.print(f"  {path.name}")
    return table


def _source(settings: DemoSettings, seed: int) -> AnomalibDataModule:
    if settings.mvtec is None:
        return ELPV(settings.cell_type, settings.train_images, seed=seed)
    defects = sorted(folder.name for folder in (settings.mvtec / "test").iterdir() if folder.name != "good")
    # Not anomalib's MVTecAD, which reads PNG files only.
    return Folder(
        name=settings.mvtec.name,
        root=settings.mvtec,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir=[f"test/{defect}" for defect in defects],
        num_workers=0,
        val_split_mode="same_as_test",
    )


def _train(kind: str, datamodule: Contaminated, settings: DemoSettings, seed: int) -> dict[str, float]:
    """One training with anomalib's Engine; ``kind`` says on what."""
    seed_everything(seed, verbose=False)
    model = MetaRefine(
        image_size=settings.image_size, rule=settings.rule, rounds=4 if kind == "refined" else 0, visualizer=False
    )
    full, injected = datamodule.train_data, datamodule.is_injected.to_numpy()
    if kind == "clean":
        datamodule.train_data = full.subsample(np.flatnonzero(~injected).tolist())
    engine = Engine(
        default_root_dir=settings.out / "runs",
        logger=False,
        enable_model_summary=False,
        # Validation finds the threshold, and only the refined model is kept.
        limit_val_batches=1.0 if kind == "refined" else 0,
    )
    begin = time.perf_counter()
    try:
        engine.fit(model, datamodule=datamodule)
        seconds = time.perf_counter() - begin
        (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    finally:
        datamodule.train_data = full
    figures = {"image_AUROC": metrics["image_AUROC"], "seconds": seconds}
    if kind == "refined":
        dirty = np.isin(model.refinement.paths, datamodule.injected)
        rejected = ~np.array(model.refinement.kept)
        figures["rejected"] = int(rejected.sum())
        figures["precision"] = float(dirty[rejected].mean()) if rejected.any() else float("nan")
        figures["recall"] = float(rejected[dirty].mean()) if dirty.any() else float("nan")
        if seed == settings.seeds[0]:
            _write_report(model, dirty, settings.out)
            engine.trainer.save_checkpoint(settings.out / "refined.ckpt")
    return figures


def _write_report(model: MetaRefine, dirty: np.ndarray, out: Path) -> None:
    model.refinement.table().assign(truly_dirty=dirty).to_csv(out / "training_images.csv", index=False)
    _histogram(model.refinement, dirty, out / "scores.png")
    _gallery(model, dirty, out / "worst_images.png")


def _histogram(refinement: Refinement, dirty: np.ndarray, path: Path) -> None:
    """Scores of the training images, by the truth that refinement did not know, with the last fence."""
    scores, fence = np.array(refinement.scores), refinement.rounds[-1].fence
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    bins = np.linspace(scores.min(), np.quantile(scores, 0.99), 50)
    clipped = scores.clip(max=bins[-1])
    axes.hist([clipped[~dirty], clipped[dirty]], bins, stacked=True, color=[_KEPT, _DIRTY], label=["good", "defective"])
    if np.isfinite(fence):
        axes.axvline(fence, color=_FENCE, linestyle="--", label=f"fence, round {len(refinement.rounds)}")
    axes.set(xlabel="curation score (robust standard deviations)", ylabel="training images")
    axes.set_title(f"{len(refinement.rejected)} of {len(scores)} training images rejected")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def _gallery(model: MetaRefine, dirty: np.ndarray, path: Path) -> None:
    """The training images with the highest scores, each over its anomaly map."""
    from anomalib.data.utils import read_image

    worst = np.argsort(model.refinement.scores)[::-1][:_GALLERY]
    model.eval()
    images = [read_image(model.refinement.paths[i], as_tensor=True) for i in worst]
    maps = [
        model.model(model.pre_processor.transform(image.unsqueeze(0)).to(model.device)).anomaly_map for image in images
    ]
    low, high = (float(q) for q in np.quantile(torch.cat(maps).cpu().numpy(), [0.2, 0.995]))
    figure, axes = plt.subplots(2, len(worst), figsize=(1.8 * len(worst), 4), layout="constrained", squeeze=False)
    for column, (i, image, heat) in enumerate(zip(worst, images, maps, strict=True)):
        height, width = image.shape[-2:]
        axes[0, column].imshow(image.permute(1, 2, 0))
        axes[1, column].imshow(image.permute(1, 2, 0), alpha=0.4)
        axes[1, column].imshow(
            heat[0, 0].cpu(), cmap="inferno", vmin=low, vmax=high, alpha=0.6, extent=(0, width, height, 0)
        )
        verdict = "kept" if model.refinement.kept[i] else "rejected"
        axes[0, column].set_title(f"{verdict}, {'defective' if dirty[i] else 'good'}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle("Training images with the highest scores, and their anomaly maps")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _print(console: Console, results: pd.DataFrame) -> None:
    digits = {"image_AUROC": 3, "rejected": 0, "precision": 2, "recall": 2, "seconds": 0}
    table = Table(title=f"Mean and spread over {results.seed.nunique()} seed(s)")
    for heading in ["trained on", "image AUROC", "rejected", "precision", "recall", "seconds"]:
        table.add_column(heading, justify="left" if heading == "trained on" else "right", no_wrap=True)
    for kind, group in results.groupby("training", sort=False):
        cells = []
        for column, places in digits.items():
            values = group[column].dropna() if column in group else pd.Series(dtype=float)
            spread = f" ± {values.std():.{places}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{places}f}{spread}" if len(values) else "-")
        table.add_row(kind, *cells)
    console.print(table)
