"""A detector over HTTP: the Open Inference Protocol (KServe v2), and one plain request for an image file."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anomalib_metarefine import __version__
from anomalib_metarefine.deploy.stopping import stop_on_signals
from anomalib_metarefine.deploy.tensors import HEADER_LENGTH, INPUT, read_query, write_answer
from anomalib_metarefine.images.reading import decode_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from anomalib_metarefine.deploy.detector import Detector, Prediction

_MOST_PIXELS = 1 << 26  # of an image file: one of a few bytes may hold more than memory does
_MOST_REQUESTS = 16  # at a time; each may be as large as is allowed
_READING_S, _ANSWER_S = 30.0, 120.0
_MAP = "anomaly_map"
_Done = TypeVar("_Done")


class Service:
    """What the requests share.

    Args:
        detector (Detector): As many images are scored at a time as it has streams.
        name (str): Of the model, in addresses.
        largest (int): Bytes of a request.
    """

    def __init__(self, detector: Detector, name: str, largest: int) -> None:
        self._detector, self._name, self._largest = detector, name, largest
        self._turns, self._one = asyncio.Semaphore(detector.streams), threading.Lock()
        self._requests = 0

    async def live(self, _: Request) -> Response:
        """Whether the process runs."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Whether the model is there: it is, before the port is open."""
        name = {"name": self._known(request)} if "model" in request.path_params else {}
        return JSONResponse({**name, "ready": True})

    async def about_server(self, _: Request) -> Response:
        """Name, version, extensions."""
        about = {"name": "metarefine", "version": __version__, "extensions": ["binary_tensor_data"]}
        return JSONResponse(about)

    async def about_model(self, request: Request) -> Response:
        """Inputs and outputs."""
        outputs = {"pred_score": "FP32", "pred_label": "BOOL", "decision": "BYTES"}
        outputs |= {"raw_score": "FP64", "threshold": "FP64"} if self._detector.threshold is not None else {}
        described = [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in outputs.items()]
        described.append({"name": _MAP, "datatype": "FP32", "shape": [-1, 1, -1, -1]})
        about = {"name": self._known(request), "versions": ["1"], "platform": "openvino"}
        inputs = [{"name": INPUT, "datatype": "FP32", "shape": [-1, 3, -1, -1]}]
        return JSONResponse({**about, "inputs": inputs, "outputs": described})

    async def infer(self, request: Request) -> Response:
        """Scores of the images of a tensor."""
        name = self._known(request)
        body = await self._body(request)
        query = await self._in_turn(read_query, body, request.headers.get(HEADER_LENGTH))
        predictions = await self._in_turn(self._scored, query.images, _MAP in query.outputs)
        outputs = self._tensors(predictions)
        usual = dict.fromkeys((one for one in outputs if one != _MAP), query.binary)
        if unknown := query.outputs.keys() - outputs.keys():
            msg = f"no output {', '.join(sorted(unknown))}; there are {', '.join([*usual, _MAP])}"
            raise ValueError(msg)
        wanted = query.outputs or usual
        head = {"model_name": name, "model_version": "1"} | ({"id": query.id} if query.id is not None else {})
        content, length = write_answer(head, {one: outputs[one] for one in wanted}, wanted)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})

    async def score(self, request: Request) -> Response:
        """Score of the image file that is the request's body, with the keys of a line of `watch`."""
        (found,) = await self._in_turn(self._scored, [await self._body(request)], False)
        line = {"score": found.score, "raw_score": found.raw_score, "threshold": self._detector.threshold}
        return JSONResponse({**line, "decision": found.decision, "latency_ms": round(1e3 * found.latency_s, 3)})

    def bounded(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Refuse what comes while too many requests are being answered."""

        async def bounded(request: Request) -> Response:
            if self._requests >= _MOST_REQUESTS:
                raise HTTPException(
                    503, f"{_MOST_REQUESTS} requests are being answered; try again", {"Retry-After": "1"}
                )
            self._requests += 1
            try:
                return await answer(request)
            finally:
                self._requests -= 1

        return bounded

    def _known(self, request: Request) -> str:
        asked, version = request.path_params["model"], request.path_params.get("version", "1")
        if (asked, version) != (self._name, "1"):
            raise HTTPException(404, f"no model {asked} of version {version}; there is {self._name} of version 1")
        return asked

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "compressed requests are not understood")
        content = bytearray()

        async def read() -> None:
            async for part in request.stream():
                content.extend(part)
                if len(content) > self._largest:
                    raise HTTPException(413, f"a request may have {self._largest} bytes (--largest)")

        try:
            await asyncio.wait_for(read(), _READING_S)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the request was not there after {_READING_S:.0f} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the request ended half way") from None
        return bytes(content)

    async def _in_turn(self, work: Callable[..., _Done], *given: Any) -> _Done:  # noqa: ANN401
        """Do what takes time and memory in a thread; only so much of it at a time."""
        async with self._turns:
            return await run_in_threadpool(work, *given)

    def _scored(self, images: list[bytes | np.ndarray], maps: bool) -> list[Prediction]:
        return [self._prediction(image, maps) for image in images]

    def _prediction(self, image: bytes | np.ndarray, maps: bool) -> Prediction:
        if isinstance(image, bytes):
            _check_size(image)
            image = decode_image(image, "The image", self._detector.bit_depth).pixels
        with self._one:  # a detector takes images from one thread at a time, and scores several
            answer = self._detector.submit(image, maps)
        return answer.result(_ANSWER_S)

    def _tensors(self, predictions: list[Prediction]) -> dict[str, np.ndarray]:
        found = {
            "pred_score": np.array([one.score for one in predictions], "<f4"),
            "pred_label": np.array([one.anomalous for one in predictions]),
            "decision": np.array([one.decision for one in predictions]),
        }
        if self._detector.threshold is not None:
            found["raw_score"] = np.array([one.raw_score for one in predictions], "<f8")
            found["threshold"] = np.full(len(predictions), self._detector.threshold, "<f8")
        maps = [one.anomaly_map for one in predictions if one.anomaly_map is not None]
        if maps:
            if len({one.shape for one in maps}) > 1:
                msg = "the maps of images of these sizes have several sizes; ask for one at a time"
                raise ValueError(msg)
            found[_MAP] = np.stack(maps)[:, None].astype("<f4", copy=False)
        return found


def make_app(detector: Detector, name: str, largest: int) -> Starlette:
    """The application; errors are ``{"error": ...}``."""
    service = Service(detector, name, largest)
    model = "/v2/models/{model}"
    routes = [
        Route("/v2", service.about_server),
        Route("/v2/health/live", service.live),
        Route("/v2/health/ready", service.ready),
        Route("/v1/score", service.bounded(service.score), methods=["POST"]),
    ]
    for path in (model, f"{model}/versions/{{version}}"):
        routes += [Route(path, service.about_model), Route(f"{path}/ready", service.ready)]
        routes.append(Route(f"{path}/infer", service.bounded(service.infer), methods=["POST"]))
    return Starlette(routes=routes, exception_handlers=dict.fromkeys((HTTPException, ValueError, Exception), _told))


def serve(detector: Detector, name: str, host: str, port: int, largest: int, opened: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        detector (Detector): The model.
        name (str): Of the model, in addresses.
        host (str): Address to listen on.
        port (int): 0 takes a free one.
        largest (int): Bytes of a request.
        opened (Callable[[str], None]): Called with the address once it is open.

    Raises:
        OSError: If the port is taken.
    """
    import uvicorn

    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    config = uvicorn.Config(
        make_app(detector, name, largest),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(_READING_S),
    )
    shown = f"[{host}]" if ":" in host else host
    opened(f"http://{shown}:{listener.getsockname()[1]}")
    with stop_on_signals():  # uvicorn hands on the signal that has ended it
        uvicorn.Server(config).run(sockets=[listener])


def _check_size(content: bytes) -> None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
    except Exception:  # the decoder says what is wrong
        return
    if pixels > _MOST_PIXELS:
        raise HTTPException(413, f"an image may have {_MOST_PIXELS} pixels, found {pixels}")


def _told(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, ValueError):
        return JSONResponse({"error": str(error)}, 400)
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
