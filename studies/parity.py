"""Exported models against their checkpoints, and the false alarms of calibrated ones: five models of anomalib.

    python -m studies.parity --out studies/results [--models Patchcore Padim Fastflow Stfpm MetaRefine] [--draws 0 ...]
    python -m studies.parity --out studies/results --tables

Each model is trained on 40 solar cells (ELPV mono), with the backbone that comes with this package or, where a model
wants another, an untrained one: neither parity nor the promise about false alarms depends on it. `parity.csv`: scores
of 60 cells at five sizes by anomalib's own export, read by anomalib's `OpenVINOInferencer`, and by ours. `alarms.csv`:
calibrated on 144 good cells that the model has not seen, counted on 200 others, in 200 random splits of each
trained model. Two hours on one CPU core; finished rows stay.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from anomalib.data.utils import read_image as read_anomalib_image
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Fastflow, Padim, Patchcore, Stfpm
from lightning import seed_everything
from PIL import Image
from scipy.stats import hypergeom

from anomalib_metarefine import ELPV, MetaRefine
from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.threshold import calibrate, most_above
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE
from anomalib_metarefine.features.offline import no_pretrained_weights, use_offline_weights
from anomalib_metarefine.images.reading import read_image
from anomalib_metarefine.model.calibration import calibrate_model, raw_scores
from anomalib_metarefine.model.export import export_model
from anomalib_metarefine.model.graph import Graph
from anomalib_metarefine.model.post_processor import score_scales
from studies.common import finished, markdown, record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

_MODELS = ("Patchcore", "Padim", "Fastflow", "Stfpm", "MetaRefine")
_SIZES = ((256, 256), (300, 300), (512, 512), (1024, 1024), (200, 640))
_TRAINED_ON, _CALIBRATED_ON, _FRESH, _DEFECTIVE, _SCORED, _SPLITS = 40, 144, 200, 60, 60, 200
_RATES = (0.01, 0.05)


def made(name: str) -> AnomalibModule:
    """A model of that name, small enough to train in a minute."""
    off = {"visualizer": False, "evaluator": False}
    offline = {"backbone": OFFLINE_BACKBONE, "layers": ["blocks.2", "blocks.4"]}
    if name == "MetaRefine":
        return MetaRefine(**off)
    if name == "Patchcore":
        return Patchcore(**offline, coreset_sampling_ratio=0.02, **off)
    if name == "Padim":
        return Padim(**offline, n_features=100, **off)
    with no_pretrained_weights():
        return Fastflow(flow_steps=2, **off) if name == "Fastflow" else Stfpm(**off)


def trained(name: str, draw: int, root: Path) -> tuple[AnomalibModule, set[str]]:
    """The model after training, and the images that it was trained on."""
    seed_everything(draw, verbose=False)
    datamodule = ELPV(train_images=_TRAINED_ON, num_workers=0, seed=draw)
    model = made(name)
    epochs = {} if "max_epochs" in model.trainer_arguments else {"max_epochs": 2}
    quick = {"logger": False, "accelerator": "cpu", "limit_val_batches": 1}
    Engine(default_root_dir=root, **quick, **epochs).fit(model, datamodule=datamodule)
    return model.eval(), set(datamodule.train_data.samples.image_path.astype(str))


def resized(files: list[Path], size: tuple[int, int], folder: Path) -> list[Path]:
    """Copies of images at another size."""
    folder.mkdir()
    for file in files:
        Image.open(file).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{file.stem}.png")
    return sorted(folder.iterdir())


def stock_answer(file: Path) -> Callable[[Path], tuple[float, bool]]:
    """Normalised score and label of an image by an untouched export, as anomalib's own inferencer has them.

    PatchCore's graph takes two images only, which the inferencer never sends: there, an image is sent twice.
    """
    inferencer = OpenVINOInferencer(file, device="CPU")
    if inferencer.model.input(0).partial_shape[0].is_dynamic:

        def answer(path: Path) -> tuple[float, bool]:
            found = inferencer.predict(path)
            return float(found.pred_score.item()), bool(found.pred_label.item())

        return answer

    def twice(path: Path) -> tuple[float, bool]:
        image = inferencer.pre_process(read_anomalib_image(path))
        found = inferencer.model(np.repeat(image, 2, 0))
        return float(found["pred_score"].flatten()[0]), bool(found["pred_label"].flatten()[0])

    return twice


def our_answer(file: Path) -> Callable[[Path], tuple[float, bool]]:
    """The same by our export."""
    graph = Graph(file)

    def answer(path: Path) -> tuple[float, bool]:
        found = graph.scores(read_image(path).pixels)
        return found.image, found.anomalous

    return answer


def parity(name: str, model: AnomalibModule, cells: list[Path], root: Path) -> Iterator[dict[str, object]]:
    """A row for each size of images: largest relative difference of raw scores and changed decisions, of both."""
    answers = {
        "stock": stock_answer(AnomalibModule.to_openvino(model, root / "stock")),
        "ours": our_answer(export_model(model, root / "ours")),
    }
    scale = score_scales(model.post_processor)[0]
    span = scale["maximum"] - scale["minimum"]
    for size in _SIZES:
        files = resized(cells, size, root / f"{size[0]}x{size[1]}")
        wanted = raw_scores(model, files).image
        row: dict[str, object] = {"model": name, "image": f"{size[0]} x {size[1]}", "images": len(files)}
        for kind, answer in answers.items():
            scores, labels = map(np.array, zip(*map(answer, files), strict=True))
            inside = (kind == "ours") | ((scores > 0) & (scores < 1))  # the stock graph clamps
            found = (scores - 0.5) * span + scale["threshold"]
            row[f"{kind}_difference"] = float((np.abs(found - wanted) / np.abs(wanted))[inside].max())
            row[f"{kind}_changed"] = int(((wanted > scale["threshold"]) != labels).sum())
        yield row


def alarms(name: str, draw: int, good: NDArray, bad: NDArray) -> Iterator[dict[str, object]]:
    """A row for each rate: calibrated on the scores of some good cells, counted on the others and on defective ones.

    With exchangeable scores, how often the fresh cells have more false alarms than asked is known beforehand
    (hypergeometric): ``over_expected``.
    """
    dirt = _CALIBRATED_ON // 10
    for rate in _RATES:
        above = max(most_above(_CALIBRATED_ON, rate, 0.95), 0)
        allowed = int(rate * (len(good) - _CALIBRATED_ON))
        beyond = hypergeom(len(good), _CALIBRATED_ON, above + allowed + 2).cdf(above)
        row: dict[str, object] = {"model": name, "draw": draw, "rate": rate, "fresh": len(good) - _CALIBRATED_ON}
        found: dict[str, list[tuple[float, ...]]] = {"clean": [], "dirty": []}
        for split in range(_SPLITS):
            rng = np.random.default_rng([draw, split])
            mixed, defective = rng.permutation(good), rng.permutation(bad)
            held_out, fresh = mixed[:_CALIBRATED_ON], mixed[_CALIBRATED_ON:]
            dirty = np.concatenate([held_out[:-dirt], defective[:dirt]])
            for kind, given in (("clean", held_out), ("dirty", dirty)):
                chosen = calibrate(given, rate)
                counted = float((fresh > chosen.threshold).mean())
                missed = float((defective[dirt:] > chosen.threshold).mean())
                found[kind].append((counted, chosen.bound, missed, counted > rate, chosen.set_aside))
        for kind, figures in found.items():
            names = ("alarms", "bound", "found", "over", "set_aside")
            row |= {f"{kind}_{name}": value for name, value in zip(names, np.mean(figures, axis=0), strict=True)}
        yield row | {"over_expected": float(beyond)}


def run(name: str, draw: int, out: Path, root: Path) -> None:
    """Both tables' rows of a model and a draw."""
    measured = out / "parity.csv", out / "alarms.csv"
    with_parity = draw == 0 and (name,) not in finished(measured[0], ["model"])
    with_alarms = (name, draw) not in finished(measured[1], ["model", "draw"])
    if not with_parity and not with_alarms:
        return
    model, known = trained(name, draw, root)
    samples = make_elpv_samples(packaged_root(), "mono").sample(frac=1, random_state=draw)
    good = [Path(p) for p in samples.image_path[samples.label_index == 0] if str(p) not in known]
    bad = [Path(path) for path in samples.image_path[samples.label_index == 1]]
    if with_parity:
        calibrate_model(model, good[:_CALIBRATED_ON], false_alarm_rate=0.05)
        half = _SCORED // 2
        record(parity(name, model, [*good[-half:], *bad[:half]], root), measured[0])
    if with_alarms:
        parts = good[: _CALIBRATED_ON + _FRESH], bad[:_DEFECTIVE]
        record(alarms(name, draw, *(raw_scores(model, part).image for part in parts)), measured[1])


def tables(out: Path) -> str:
    """The tables of the docs: the scores at each size, the same in a line a model, and the false alarms."""
    scores = pd.read_csv(out / "parity.csv")
    told = {"stock": "anomalib's export", "ours": "ours"}
    lines = [
        [row["model"], row["image"], *(f"{row[f'{k}_difference']:.0e}, {row[f'{k}_changed']}" for k in told)]
        for _, row in scores.iterrows()
    ]
    short = [
        [name, *(f"{part[f'{k}_difference'].max():.0e}, {part[f'{k}_changed'].sum()}" for k in told)]
        for name, part in scores.groupby("model", sort=False)
    ]
    counted = pd.read_csv(out / "alarms.csv").groupby(["model", "rate"], sort=False).mean(numeric_only=True)
    counts = [
        [
            str(name), f"{rate:.0%}", f"{row.clean_alarms:.1%}", f"{row.dirty_alarms:.1%}", f"{row.clean_bound:.1%}",
            f"{row.clean_over:.0%} ({row.over_expected:.0%})", f"{row.clean_found:.0%}, {row.dirty_found:.0%}",
        ]
        for (name, rate), row in counted.iterrows()
    ]  # fmt: skip
    return "\n\n".join(
        [
            markdown(["model", "image", *told.values()], lines),
            markdown(["model", *told.values()], short),
            markdown(
                ["model", "asked", "false alarms", "with 10 % defective", "bound", "splits over it", "defects found"],
                counts,
            ),
        ]
    )


def main() -> None:
    """Measure what is missing, or print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of parity.csv and alarms.csv")
    parser.add_argument("--models", nargs="+", default=_MODELS, choices=_MODELS)
    parser.add_argument("--draws", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--tables", action="store_true", help="print the tables of what was measured")
    options = parser.parse_args()
    if options.tables:
        print(tables(options.out))
        return
    warnings.filterwarnings("ignore")
    use_offline_weights()
    for draw in options.draws:
        for name in options.models:
            with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
                run(name, draw, options.out, Path(folder))


if __name__ == "__main__":
    main()
