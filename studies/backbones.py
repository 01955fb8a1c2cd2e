"""What the presets of configs/model/ cost in time, memory and file size: the table of docs/backbones.md.

    python -m studies.backbones

Weights are untrained: they cost the same. Times are ratios to the first preset, taken in turns in one process, so that
whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openvino as ov
import pandas as pd
import torch
import yaml

from anomalib_metarefine.features.backbone import Backbone, fitting_size

PRESETS = ("edge", "balanced", "accurate")
TURNS = 15
_MEMORY = """
import sys, openvino as ov, numpy as np
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
before = resident()
compiled = ov.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
compiled(np.zeros(eval(sys.argv[2]), "float32"))
print(resident() - before)
"""


def exported(preset: str, folder: Path) -> tuple[Backbone, torch.Tensor, Path]:
    """Untrained backbone of a preset, an image of its size, and its OpenVINO file in FP32."""
    settings = yaml.safe_load(Path(f"configs/model/{preset}.yaml").read_text())["model"]["init_args"]
    backbone = Backbone(settings["backbone"], settings.get("layers"), pre_trained=False)
    image = torch.rand(1, 3, *fitting_size(settings["backbone"], tuple(settings.get("image_size") or (256, 256))))
    path = folder / f"{preset}.xml"
    onnx = path.with_suffix(".onnx")  # the way `MetaRefine` exports; a traced graph loses the exact filter of positions
    torch.onnx.export(backbone, (image,), onnx, dynamo=True, opset_version=18, verbose=False)
    ov.save_model(ov.convert_model(onnx), path, compress_to_fp16=False)
    return backbone, image, path


def main() -> None:
    """Print the table."""
    rows, calls = [], {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for preset in PRESETS:
            backbone, image, path = exported(preset, Path(folder))
            memory = subprocess.run(
                [sys.executable, "-c", _MEMORY, str(path), str(tuple(image.shape))],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            for hint in ("f32", "bf16"):
                calls[preset, hint] = (
                    ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint}), image.numpy()
                )  # fmt: skip
            maps, theirs = backbone(image), calls[preset, "f32"][0](image.numpy())
            parity = max(float((m - torch.tensor(theirs[i])).abs().max() / m.abs().max()) for i, m in enumerate(maps))
            rows.append(
                {
                    "preset": preset,
                    "image": "{} x {}".format(*image.shape[-2:]),
                    "patches": "{} x {}".format(*maps[-1].shape[-2:]),
                    "channels": sum(backbone.channels),
                    "file (MB)": round(path.with_suffix(".bin").stat().st_size / 1e6, 1),
                    "memory (MB)": round(float(memory)),
                    "parity": f"{parity:.0e}",
                }
            )
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in range(TURNS + 1):
            for key, (compiled, image) in calls.items():
                begin = time.perf_counter()
                compiled(image)
                seconds[key].append(time.perf_counter() - begin)
    unit = statistics.median(seconds[PRESETS[0], "f32"][1:])
    for row in rows:
        for hint in ("f32", "bf16"):
            row[f"time, {hint}"] = round(statistics.median(seconds[row["preset"], hint][1:]) / unit, 1)
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    main()
