"""Scores of exported models against their checkpoints: anomalib's export and ours, at several image sizes.

    python -m studies.parity [--models Padim Fastflow Stfpm MetaRefine] [--images 20]

Each model is trained on solar cells (ELPV) with an untrained backbone where no weights can be had: parity does not
depend on them. Its threshold is calibrated on cells that it has not seen, so that decisions can be compared, and fresh
ones tell the rate of false alarms. Several minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import timm
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Fastflow, Padim, Patchcore, Stfpm
from lightning import seed_everything
from PIL import Image

from anomalib_metarefine import ELPV, MetaRefine
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.features.offline import no_pretrained_weights
from anomalib_metarefine.images.reading import read_image
from anomalib_metarefine.model.calibration import calibrate_model, raw_scores
from anomalib_metarefine.model.export import export_model
from anomalib_metarefine.model.graph import Graph
from anomalib_metarefine.model.post_processor import score_scales
from studies.common import markdown

_SIZES = ((256, 256), (300, 300), (512, 512), (1024, 1024), (200, 640))
_CALIBRATED_ON = 100
_FRESH = 100
_RATE = 0.05


def made(name: str) -> AnomalibModule:
    """A model of that name, small enough to train in a minute."""
    off = {"visualizer": False, "evaluator": False}
    if name == "MetaRefine":
        return MetaRefine(**off)
    with no_pretrained_weights():
        return {
            "Patchcore": lambda: Patchcore(backbone="resnet18", coreset_sampling_ratio=0.01, **off),
            "Padim": lambda: Padim(**off),
            "Fastflow": lambda: Fastflow(flow_steps=2, **off),
            "Stfpm": lambda: Stfpm(**off),
        }[name]()


def resized(files: list[Path], size: tuple[int, int], folder: Path) -> list[Path]:
    """Copies of images at another size."""
    folder.mkdir()
    for file in files:
        Image.open(file).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{file.stem}.png")
    return sorted(folder.iterdir())


def gap(model: AnomalibModule, graph: Graph, files: list[Path]) -> tuple[float, int]:
    """Largest relative difference of raw image scores, and changed decisions."""
    scale = score_scales(model.post_processor)[0]
    wanted = raw_scores(model, files).image
    answers = [graph.scores(read_image(file).pixels) for file in files]
    span = scale["maximum"] - scale["minimum"]
    found = (np.array([answer.image for answer in answers]) - 0.5) * span + scale["threshold"]
    changed = (wanted > scale["threshold"]) != np.array([answer.anomalous for answer in answers])
    return float((np.abs(found - wanted) / np.abs(wanted)).max()), int(changed.sum())


def rows(name: str, images: int, root: Path) -> tuple[list[list[str]], list[str]]:
    """The table of one model, and its row of false alarms."""
    seed_everything(0, verbose=False)
    datamodule = ELPV(train_images=40, num_workers=0)
    model = made(name)
    epochs = {} if "max_epochs" in model.trainer_arguments else {"max_epochs": 2}
    Engine(default_root_dir=root, logger=False, accelerator="cpu", limit_val_batches=1, **epochs).fit(
        model, datamodule=datamodule
    )
    model.eval()
    known = set(datamodule.train_data.samples.image_path.astype(str))
    samples = make_elpv_samples(packaged_root(), "mono")
    good = [Path(path) for path in samples.image_path[samples.label_index == 0] if str(path) not in known]
    order = np.random.default_rng(0).permutation(len(good))
    good = [good[i] for i in order]
    found, _ = calibrate_model(model, good[:_CALIBRATED_ON], false_alarm_rate=_RATE)
    fresh = raw_scores(model, good[_CALIBRATED_ON : _CALIBRATED_ON + _FRESH]).image
    rate = [name, f"{_RATE:.0%}", f"{found.bound:.1%}", f"{(fresh > found.threshold).mean():.1%}", str(len(fresh))]

    cells = [Path(path) for path in samples.image_path[samples.label_index >= 0]]
    cells = cells[:: len(cells) // images][:images]
    graphs = {
        kind: Graph(export_model(model, root / name / kind, exact_resize=kind == "ours"))
        for kind in ("anomalib's", "ours")
    }
    table = []
    for size in _SIZES:
        files = resized(cells, size, root / f"{name}_{size[0]}x{size[1]}")
        both = [gap(model, graph, files) for graph in graphs.values()]
        table.append([name, f"{size[0]} x {size[1]}", *(f"{most:.1e}, {changed}" for most, changed in both)])
    return table, rate


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["Padim", "Fastflow", "Stfpm", "MetaRefine"])
    parser.add_argument("--images", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = [rows(name, options.images, Path(folder)) for name in options.models]
    print(f"timm {timm.__version__}; of {options.images} images: largest relative difference, changed decisions")
    print(markdown(["model", "image", "anomalib's resize", "ours"], [line for table, _ in results for line in table]))
    header = ["model", "asked", "bound", "false alarms", "fresh images"]
    print(markdown(header, [rate for _, rate in results]))


if __name__ == "__main__":
    main()
