"""Score images with an exported model: openvino, numpy and Pillow, nothing else.

python plain_openvino.py MODEL_DIR IMAGE [IMAGE ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino as ov
from PIL import Image, ImageOps

folder, paths = Path(sys.argv[1]), sys.argv[2:]

# Without the hint, processors with bfloat16 compute in it, and scores move by up to 4 %.
model = ov.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

image_score, uncertain = None, None
if (folder / "metadata.json").is_file():
    metadata = json.loads((folder / "metadata.json").read_text())
    image_score = metadata["image_score"]  # raw threshold, minimum, maximum
    uncertain = (metadata["calibration"] or {}).get("uncertain")

for path in paths:
    # As in training: upright, RGB, values in [0, 1], any size; the graph resizes. Pillow cuts off what is deeper than
    # 8 bits: divide the levels of such files by their full scale instead.
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), dtype=np.float32) / 255
    answer = model(pixels.transpose(2, 0, 1)[np.newaxis])
    score = answer["pred_score"].item()  # in [0, 1], the threshold is 0.5; answer["anomaly_map"] is [1, 1, h, w]
    decision = "anomalous" if answer["pred_label"].item() else "normal"
    if uncertain:
        raw = (score - 0.5) * (image_score["maximum"] - image_score["minimum"]) + image_score["threshold"]
        if uncertain["lower"] <= raw <= uncertain["upper"]:
            decision = "uncertain"
    print(f"{path}\t{score:.6f}\t{decision}")
