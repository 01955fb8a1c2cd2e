"""Latency of exported models in OpenVINO, one image at a time, side by side.

    python -m studies.latency --out studies/results/latency.csv

Every model is exported by anomalib and compiled for one image of 256 x 256 pixels. They take turns, so that whatever
else the machine does hits all alike. Weights don't matter to speed: anomalib's models are untrained, PatchCore and
PaDiM have random statistics of the size that training gives.
"""

from __future__ import annotations

import argparse
import copy
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import openvino as ov
import pandas as pd
import timm
import torch
from anomalib.deploy.export import CompressionType
from anomalib.engine import Engine
from anomalib.models import EfficientAd, Fastflow, Padim, Patchcore, Stfpm
from lightning import seed_everything
from rich.progress import track

from anomalib_metarefine.data.elpv import ELPV
from anomalib_metarefine.features.backbone import Backbone
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.model.lightning_model import MetaRefine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anomalib.models.components import AnomalibModule

SIZE = (256, 256)
LAYERS = ("blocks.2", "blocks.4")  # strides 8 and 16
_CORESET = 30_720  # patches that PatchCore keeps of 300 images: a tenth of 1,024 patches each
_ONE_IMAGE = {"dynamic_axes": {}, "opset_version": 18}  # PatchCore's graph takes no other batch than that of its export
_ROUNDS, _RUNS, _WARM_UP = 10, 12, 2


def export_all(folder: Path) -> dict[str, Path]:
    """Export every model.

    Args:
        folder (Path): Where to.

    Returns:
        dict[str, Path]: The graph of each model, by its name in the table.
    """
    metarefine = _metarefine(folder / "training")
    graphs = {
        "backbone alone": _backbone(folder / "backbone.onnx"),
        "MetaRefine": metarefine.to_openvino(folder / "fixed", input_size=SIZE),
        "MetaRefine, 8 variants": with_variants(metarefine, 8).to_openvino(folder / "eight", input_size=SIZE),
        "MetaRefine, images of any size": metarefine.to_openvino(folder / "any"),
        "MetaRefine, INT8": metarefine.to_openvino(
            folder / "int8", input_size=SIZE, compression_type=CompressionType.INT8_PTQ
        ),
    }
    builders: dict[str, Callable[[], AnomalibModule]] = {
        "FastFlow, ResNet-18": lambda: Fastflow(backbone="resnet18", pre_trained=False),
        "STFPM, ResNet-18": Stfpm,
        "PaDiM, same backbone": _padim,
        "PatchCore, same backbone": _patchcore,
        "EfficientAd-S": EfficientAd,
    }
    with _no_downloads():
        for name, build in track(builders.items(), "exporting anomalib's models"):
            graphs[name] = build().eval().to_openvino(folder / name, input_size=SIZE, onnx_kwargs=_ONE_IMAGE)
    return graphs


def measure(graphs: dict[str, Path], precisions: tuple[str, ...] = ("f32", "bf16")) -> pd.DataFrame:
    """Time all graphs in turns, then weigh each in a process of its own.

    Args:
        graphs (dict[str, Path]): Exported models; the first is what the others are compared with.
        precisions (tuple[str, ...]): What OpenVINO computes in.

    Returns:
        pd.DataFrame: One row for each model and precision: ``p50_ms``, ``p95_ms``, ``ratio`` to the first, ``file_mb``,
        ``memory_mb``.
    """
    rows = []
    for precision in precisions:
        seconds = _take_turns({name: _compile(path, precision) for name, path in graphs.items()}, precision)
        first = np.median(next(iter(seconds.values())))
        for name, path in graphs.items():
            p50, p95 = np.percentile(seconds[name], [50, 95]) * 1e3
            size = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}*") if file.suffix != ".json")
            row = {"model": name, "precision": precision, "p50_ms": p50, "p95_ms": p95, "ratio": p50 / first / 1e3}
            rows.append({**row, "file_mb": size / 1e6, "memory_mb": _memory(path, precision)})
    return pd.DataFrame(rows)


def _take_turns(networks: dict[str, ov.CompiledModel], precision: str) -> dict[str, list[float]]:
    image = np.random.default_rng(0).random((1, 3, *SIZE), dtype=np.float32)
    requests = {name: network.create_infer_request() for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in track(range(_ROUNDS), f"inference in {precision}"):
        for name, request in requests.items():
            for run in range(_WARM_UP + _RUNS):
                begin = time.perf_counter()
                request.infer([image])
                if run >= _WARM_UP:
                    seconds[name].append(time.perf_counter() - begin)
    return seconds


def _compile(path: Path, precision: str) -> ov.CompiledModel:
    core = ov.Core()
    model = core.read_model(path)
    model.reshape([1, 3, *SIZE])
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"})


def _memory(path: Path, precision: str) -> float:
    """Megabytes that a process takes for loading and running a graph."""
    command = [sys.executable, "-m", "studies.peak_memory", path, *map(str, SIZE), precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _metarefine(folder: Path) -> MetaRefine:
    """A default model, trained on 40 solar cells."""
    seed_everything(0, verbose=False)
    model = MetaRefine(visualizer=False)
    engine = Engine(default_root_dir=folder, logger=False, accelerator="cpu", limit_val_batches=1)
    engine.fit(model, datamodule=ELPV(train_images=40))
    return model.eval()


def with_variants(model: MetaRefine, count: int) -> MetaRefine:
    """A copy with so many variants, all alike: which of them an image fits best does not matter to speed."""
    several = copy.deepcopy(model)
    scorer = several.model.scorer
    for name, value in list(scorer.named_buffers()):
        if name in ("shift", "log_det") or name.startswith("root_"):
            setattr(scorer, name, value.expand(count, *value.shape).contiguous())
    scorer.leading_log_det = scorer.log_det.clone()
    return several


def _backbone(path: Path) -> Path:
    net = Backbone(OFFLINE_BACKBONE).eval().net
    torch.onnx.export(net, (torch.zeros(1, 3, *SIZE),), str(path), dynamo=True, opset_version=18, verbose=False)
    return path


def _padim() -> Padim:
    model = Padim(backbone=OFFLINE_BACKBONE, layers=list(LAYERS), pre_trained=False, n_features=100)
    patches = (SIZE[0] // 8) * (SIZE[1] // 8)
    model.model.gaussian.mean = torch.randn(100, patches)
    model.model.gaussian.inv_covariance = torch.randn(patches, 100, 100)
    return model


def _patchcore() -> Patchcore:
    model = Patchcore(backbone=OFFLINE_BACKBONE, layers=list(LAYERS), pre_trained=False)
    model.model.memory_bank = torch.randn(_CORESET, 152)
    return model


@contextmanager
def _no_downloads() -> Iterator[None]:
    """Some of anomalib's models always ask for pretrained weights, which are of no use here."""
    create = timm.create_model

    def untrained(*args: object, **kwargs: object) -> torch.nn.Module:
        return create(*args, **{**kwargs, "pretrained": False})

    with mock.patch("timm.create_model", untrained):
        yield


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="table to write")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="metarefine-latency-") as folder:
        table = measure(export_all(Path(folder)))
    table.to_csv(options.out, index=False, float_format="%.3f")
    print(table.round(2).to_string(index=False))
    print(f"OpenVINO {ov.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
