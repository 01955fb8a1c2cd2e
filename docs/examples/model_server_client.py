"""Score images by OpenVINO Model Server, over the KServe REST API: numpy and Pillow, nothing else.

python model_server_client.py http://localhost:8000 MODEL IMAGE [IMAGE ...]
"""

import json
import sys
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps

server, model, paths = sys.argv[1], sys.argv[2], sys.argv[3:]

for path in paths:
    # As in training: upright, RGB, values in [0, 1], any size; the graph resizes. 8-bit files only.
    pixels = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), dtype=np.float32) / 255
    pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)[np.newaxis])
    data = pixels.astype("<f4").tobytes()
    tensor = {"name": "input", "datatype": "FP32", "shape": pixels.shape, "parameters": {"binary_data_size": len(data)}}
    wanted = [{"name": "pred_score"}, {"name": "pred_label"}]
    header = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    request = Request(
        f"{server}/v2/models/{model}/infer",
        data=header + data,
        headers={"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))},
    )
    with urlopen(request, timeout=30) as reply:
        answer = {output["name"]: output["data"] for output in json.load(reply)["outputs"]}
    score, anomalous = answer["pred_score"][0], answer["pred_label"][0]  # the threshold is 0.5
    print(f"{path}\t{score:.6f}\t{'anomalous' if anomalous else 'normal'}")
