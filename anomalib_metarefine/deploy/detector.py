"""An exported model in plain OpenVINO: the computer on the line needs neither torch nor anomalib."""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import openvino as ov
from PIL import Image

from anomalib_metarefine.deploy.sidecar import SIDECAR, Sidecar, read_sidecar, verify_files
from anomalib_metarefine.images.reading import check_bit_depth, file_hash

DECISIONS = ("normal", "anomalous", "uncertain")
_MODEL_FILES = {"openvino": "model.xml", "onnx": "model.onnx"}


class Prediction(NamedTuple):
    """What the model says about an image.

    Attributes:
        score (float): Image score in [0, 1]; the exported threshold is 0.5.
        raw_score (float | None): In the unit of ``metadata.json``. Where ``score`` is 0 or 1 the graph has clamped it,
            and this is the limit, not the score. ``None`` without ``metadata.json``, or if it names no threshold.
        anomalous (bool): What the graph itself says, ``pred_label``.
        decision (str): ``"normal"``, ``"anomalous"`` or ``"uncertain"``.
        anomaly_map (np.ndarray | None): ``[h, w]`` float32 in [0, 1] at the model's resolution, where asked for.
        latency_s (float): Seconds from handing over the pixels to the answer.
    """

    score: float
    raw_score: float | None
    anomalous: bool
    decision: str
    anomaly_map: np.ndarray | None
    latency_s: float


_alive: WeakSet[Detector] = WeakSet()


@atexit.register
def _wait_at_exit() -> None:
    """An answer that comes while Python shuts down would abort the process, and spoil its exit code."""
    for detector in list(_alive):
        detector.wait()


class Detector:
    """A deployed model, compiled once. Not to be shared between threads.

    A network for each image size takes a third of a second to compile, and one of free sizes keeps memory for every
    size it meets. So images are resized before the network where ``metadata.json`` says that the graph itself would do
    just that: an antialiased bilinear resize to two sides. Else the network has free sizes.

    Args:
        folder (str | Path): With ``model.xml`` and ``model.bin``, or ``model.onnx``, and ``metadata.json``. Without
            the last, decisions are those of the graph, there are no raw scores, and no image is uncertain.
        device (str): OpenVINO's name of it.
        precision (str): ``"f32"`` scores like the checkpoint; ``"bf16"`` or ``"f16"`` are quicker where the processor
            has them, and move the scores (docs/deployment.md).
        streams (int): Images inferred at the same time by `submit`. One gives the lowest latency.
        threads (int | None): Processor threads for all of them; ``None`` leaves it to OpenVINO.
        verify (bool): Compare the files with the SHA-256 in ``metadata.json``.
        bit_depth (int | None): Bits in use of image files with more than 8, for `read_image`; ``None`` takes what
            ``metadata.json`` says of the training.

    Attributes:
        bit_depth (int | None): The same; ``None`` takes the full scale of each file.
        sidecar (Sidecar | None): The content of ``metadata.json``.
        threshold (float | None): Raw score above which an image is anomalous.
        uncertain (tuple[float, float] | None): Raw scores between which a person should look.
        calibration (dict[str, Any] | None): How the threshold was chosen, with quantiles of normal images' raw scores.

    Raises:
        FileNotFoundError: If there is no model in the folder.
        ValueError: If a file is not the one that was exported, or the graph is not a detector.

    Example:
        >>> detector = Detector("weights/openvino")  # doctest: +SKIP
        >>> detector.predict(read_image("part.png", detector.bit_depth).pixels).decision  # doctest: +SKIP
        'normal'
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "CPU",
        precision: str = "f32",
        streams: int = 1,
        threads: int | None = None,
        verify: bool = True,
        bit_depth: int | None = None,
    ) -> None:
        if streams < 1:
            msg = f"streams must be at least 1, found {streams}."
            raise ValueError(msg)
        self.folder, self.device, self.streams = Path(folder), device, streams
        self.sidecar = read_sidecar(self.folder) if (self.folder / SIDECAR).is_file() else None
        self.file = _model_file(self.folder, self.sidecar)
        if verify and self.sidecar is not None:
            verify_files(self.folder, self.sidecar)
        recorded = self.sidecar.input.get("bit_depth") if self.sidecar else None
        self.bit_depth = recorded if bit_depth is None else bit_depth
        check_bit_depth(self.bit_depth)
        self._core = ov.Core()
        self._model = _read(self._core, self.file)
        self._config = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": str(streams)}
        self._config["PERFORMANCE_HINT"] = "LATENCY" if streams == 1 else "THROUGHPUT"
        if threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = str(threads)
        self._takes, self._resizes_to = _sizes(self._model, self.sidecar)
        compiled = self._compile()
        self._request, self._queue = compiled.create_infer_request(), ov.AsyncInferQueue(compiled, streams)
        self._queue.set_callback(lambda request, answer: answer(request))
        _alive.add(self)

        score = self.sidecar.image_score if self.sidecar else {}
        known = all(score.get(key) is not None for key in ("threshold", "minimum", "maximum"))
        self.threshold: float | None = score["threshold"] if known else None
        self.calibration: dict[str, Any] | None = self.sidecar.calibration if self.sidecar and known else None
        band = (self.calibration or {}).get("uncertain")
        self.uncertain = (float(band["lower"]), float(band["upper"])) if band else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model's files and its metadata: another one is another detector."""
        files = sorted({self.file, self.file.with_suffix(".bin"), self.folder / SIDECAR})
        content = {file.name: file_hash(file) for file in files if file.is_file()}
        content["bit_depth"] = str(self.bit_depth)  # the same file has other pixels with another
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def predict(self, image: np.ndarray, anomaly_map: bool = False) -> Prediction:
        """Score one image.

        Args:
            image (np.ndarray): ``[H, W, 3]`` float32 in [0, 1], RGB: the ``pixels`` of `read_image`.
            anomaly_map (bool): Give the map too.

        Raises:
            ValueError: If the image is of another shape or type, or of a size the model doesn't take.
        """
        start = time.perf_counter()
        self._request.infer({0: self._batch(image)})
        return self._prediction(self._request, anomaly_map, time.perf_counter() - start)

    def submit(self, image: np.ndarray, anomaly_map: bool = False) -> Future[Prediction]:
        """Score one image while others are being scored; waits while all streams are busy.

        Args:
            image (np.ndarray): As for `predict`. It is copied.
            anomaly_map (bool): Give the map too.

        Returns:
            Future[Prediction]: Its ``result()`` waits for the answer.

        Raises:
            ValueError: As `predict`.
        """
        start = time.perf_counter()
        future: Future[Prediction] = Future()
        batch = self._batch(image)

        def answer(request: ov.InferRequest) -> None:
            try:
                future.set_result(self._prediction(request, anomaly_map, time.perf_counter() - start))
            except Exception as error:  # one that leaves this thread would be lost, and the future wait forever
                future.set_exception(error)

        self._queue.start_async({0: batch}, answer)
        return future

    def wait(self) -> None:
        """Wait for everything that was submitted."""
        self._queue.wait_all()

    def decide(self, anomalous: bool, raw_score: float | None, threshold: float | None = None) -> str:
        """The decision, with the graph's threshold or another.

        Args:
            anomalous (bool): What the graph says.
            raw_score (float | None): Raw image score.
            threshold (float | None): Raw threshold in place of the exported one; the band of uncertain scores moves
                along.
        """
        if raw_score is None or self.threshold is None:
            return "anomalous" if anomalous else "normal"
        limit = self.threshold if threshold is None else threshold
        moved = limit - self.threshold
        if self.uncertain and self.uncertain[0] + moved <= raw_score <= self.uncertain[1] + moved:
            return "uncertain"
        if moved:
            anomalous = raw_score > limit
        return "anomalous" if anomalous else "normal"

    def _prediction(self, request: ov.InferRequest, anomaly_map: bool, latency: float) -> Prediction:
        score = float(request.get_tensor("pred_score").data.reshape(-1)[0])
        if not math.isfinite(score):
            msg = f"The model gave the score {score}: it was exported before it was trained, or its files are damaged."
            raise ValueError(msg)
        anomalous = bool(request.get_tensor("pred_label").data.reshape(-1)[0])
        raw = self.sidecar.raw_score(score) if self.sidecar and self.threshold is not None else None
        scores = request.get_tensor("anomaly_map").data if anomaly_map else None
        scores = scores.reshape(scores.shape[-2:]).copy() if scores is not None else None
        return Prediction(score, raw, anomalous, self.decide(anomalous, raw), scores, latency)

    def _batch(self, image: np.ndarray) -> np.ndarray:
        """``[1, 3, h, w]`` as the compiled network takes it."""
        if image.dtype != np.float32 or image.ndim != 3 or image.shape[2] != 3:
            msg = f"Expected an image [H, W, 3] of float32 in [0, 1], found {list(image.shape)} of {image.dtype}. "
            msg += "Pass the pixels of read_image."
            raise ValueError(msg)
        if self._takes not in (None, image.shape[:2]):
            msg = f"The model takes images of {self._takes[0]} x {self._takes[1]} pixels, found {image.shape[0]} x "
            msg += f"{image.shape[1]}. Resize them as for the training, or export the model for any size."
            raise ValueError(msg)
        if self._resizes_to in (None, image.shape[:2]):
            return np.ascontiguousarray(image.transpose(2, 0, 1)[None])
        return resized(image, self._resizes_to)[None]

    def _compile(self) -> ov.CompiledModel:
        sides = self._takes or self._resizes_to or (-1, -1)
        if -1 in sides and self.device == "CPU":
            self._config["CPU_RUNTIME_CACHE_CAPACITY"] = "0"  # else 0.6 MB for each new size; latency is the same
        try:
            self._model.reshape([1, 3, *sides])
            return self._core.compile_model(self._model, self.device, self._config)
        except RuntimeError as error:
            shown = "any size" if -1 in sides else f"{sides[0]} x {sides[1]}"
            msg = f"{self.file} can't be compiled for one image of {shown} on {self.device}: {_short(error)}"
            raise ValueError(msg) from error


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased bilinear resize, as torchvision has it in the training and the exported graph; agrees to 2e-5.

    Args:
        image (np.ndarray): ``[H, W, C]`` float32.
        size (tuple[int, int]): Height and width.

    Returns:
        np.ndarray: ``[C, height, width]``.
    """
    channels = (Image.fromarray(np.ascontiguousarray(image[..., i])) for i in range(image.shape[2]))
    return np.stack([np.asarray(channel.resize(size[::-1], Image.Resampling.BILINEAR)) for channel in channels])


def _sizes(model: ov.Model, sidecar: Sidecar | None) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The one size of images that the model takes, and the size to resize them to before it; ``None`` for any."""
    rows, columns = model.input(0).partial_shape[2:]
    said = sidecar.input if sidecar else {}
    accepts, size = said.get("accepts", "any"), said.get("size")
    if accepts != "any":
        return tuple(accepts), None
    if rows.is_static and columns.is_static:
        return (rows.get_length(), columns.get_length()), None
    return None, tuple(size) if said.get("antialias") and size and len(size) == 2 else None


def _model_file(folder: Path, sidecar: Sidecar | None) -> Path:
    kind = sidecar.model.get("format") if sidecar else None
    names = [_MODEL_FILES[kind]] if kind in _MODEL_FILES else list(_MODEL_FILES.values())
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    msg = f"No model in {folder}: expected {' or '.join(names)}, found {', '.join(found[:10]) or 'nothing'}. "
    msg += "Export one with `anomalib export --model MetaRefine --export_type openvino`, and pass the folder it is in."
    raise FileNotFoundError(msg)


def _read(core: ov.Core, file: Path) -> ov.Model:
    try:
        model = core.read_model(file)
    except RuntimeError as error:
        msg = f"{file} can't be read as a model: {_short(error)}. Copy it again, with all files beside it."
        raise ValueError(msg) from error
    found = {name for output in model.outputs for name in output.get_names()}
    missing = {"pred_score", "pred_label", "anomaly_map"} - found
    if missing or len(model.inputs) != 1:
        msg = f"{file} is not a detector that anomalib exported: the outputs {', '.join(sorted(missing))} are missing."
        raise ValueError(msg)
    return model


def _short(error: Exception) -> str:
    """The last line: OpenVINO's errors begin with where in its sources they were raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
