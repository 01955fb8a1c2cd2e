"""The web server of a review: one page, its pictures and its answers, for this machine only."""

from __future__ import annotations

import io
import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from PIL import Image as Pillow
from scipy.stats import rankdata
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from anomalib_metarefine.curation.pictures import heat_layer, thumbnail
from anomalib_metarefine.curation.run_folder import REPORT_FILE, manifest_file
from anomalib_metarefine.images.reading import UnreadableImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from anomalib_metarefine.curation.review.session import Page, Session

_HERE = Path(__file__).parent
_THUMBNAIL, _LAYER = 640, 320  # pixels, side of a square image
_FULL = 1 << 16
_KEPT = 1000  # small pictures in memory, about 100 kB each
_SHOWN_AS_IT_IS = {"PNG": {"L", "RGB", "RGBA", "P", "1"}, "JPEG": {"L", "RGB"}, "WEBP": {"RGB", "RGBA"}}
_MOST_POSTED = 1 << 20  # bytes
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; ",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Lets only this server's own page in: a name of this machine in Host, and no foreign Origin.

    A page elsewhere can make a browser send requests here, under a name of its own that leads to 127.0.0.1. The secret
    in the address keeps other users of the machine out; this keeps other pages of the same browser out.

    Args:
        app (ASGIApp): What is guarded.
        hosts (set[str]): Names with ports by which the server may be called.
        around (str): Pages that may show this one inside of them, as ``frame-ancestors`` names them.
    """

    def __init__(self, app: ASGIApp, hosts: set[str], around: str) -> None:
        self._app, self._hosts = app, hosts
        policy = _HEADERS["Content-Security-Policy"] + f"frame-ancestors {around}"
        self._headers = [(k.encode(), v.encode()) for k, v in {**_HEADERS, "Content-Security-Policy": policy}.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or hand on with the headers of safety added."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        own = host in self._hosts and (origin is None or origin == f"http://{host}")
        posts = scope["method"] not in ("GET", "HEAD")
        if not own or (posts and origin is None):
            refusal = PlainTextResponse("Open the address that `metarefine review` printed, as it is.\n", 403)
            await refusal(scope, receive, send)
            return

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += self._headers
            await send(message)

        await self._app(scope, receive, with_headers)


class Pictures:
    """Small pictures and maps, made when first asked for.

    Args:
        session (Session): Whose images.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.small = lru_cache(_KEPT)(self._small)
        evidence = session.evidence
        self._maps = dict(zip(evidence.paths, evidence.maps, strict=True)) if evidence else {}
        nearest = dict(zip(evidence.paths, evidence.nearest, strict=True)) if evidence else {}
        self.nearest = [next((nearest[p] for p in i.paths if nearest.get(p)), "") for i in session.images]

    def has_map(self, index: int) -> bool:
        """Whether the curation stored an anomaly map of the image."""
        return any(path in self._maps for path in self._session.images[index].paths)

    def _small(self, name: str) -> bytes:
        """JPEG of an image by its path; `OSError` or a kin of it if it can't be read."""
        return _encoded(thumbnail(self._session.root / name, _THUMBNAIL), "JPEG")

    def layer(self, index: int) -> bytes:
        """PNG of the anomaly map, transparent where the image is usual."""
        paths = self._session.images[index].paths
        heat = next(self._maps[path] for path in paths if path in self._maps)
        rows, columns = heat.shape
        scale = _LAYER / max(rows, columns)
        size = (round(columns * scale), round(rows * scale))
        return _encoded(heat_layer(heat, self._session.evidence.limits, size), "PNG")


def make_app(session: Session, token: str, hosts: set[str], around: str = "'none'") -> ASGIApp:
    """The application.

    Args:
        session (Session): The review.
        token (str): First part of every address.
        hosts (set[str]): Names with ports by which the server may be called.
        around (str): Pages that may show this one inside of them, as ``frame-ancestors`` names them.
    """
    pictures = Pictures(session)
    # By itself it escapes names in *.html only.
    templates = Jinja2Templates(env=jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE), autoescape=True))

    def shown(request: Request) -> Response:
        context = {"source": session.manifest.run.get("source", str(session.root)), "folder": str(session.folder)}
        return templates.TemplateResponse(request, "review.html.j2", context, headers={"Cache-Control": "no-store"})

    def page_state(page: Page | None) -> dict[str, Any]:
        state = {"standing": session.standing()._asdict(), "page": None, "soon": []}
        if page is not None:
            state["page"] = {"number": page.number, "kind": page.kind, "cards": [card(i) for i in page.images]}
            state["soon"] = session.soon()
        return state

    def card(index: int) -> dict[str, Any]:
        image = session.images[index]
        return {
            "index": index,
            "path": image.path,
            "copies": len(image.paths),
            "alike": len(session.undecided_alike(index)),
            "variant": len(session.undecided_alike(index, "variant")),
            "map": pictures.has_map(index),
            "nearest": pictures.nearest[index],
            "quality": image.row["quality"],
            "score": image.row["score"] if math.isfinite(image.row["score"]) else None,  # NaN is no JSON
            "decision": session.answers.get(index, ""),
        }

    async def post(request: Request) -> Response:
        if int(request.headers.get("content-length", _MOST_POSTED)) >= _MOST_POSTED:
            return PlainTextResponse("Too much at once.\n", 413)
        try:
            return JSONResponse(await run_in_threadpool(act, request.path_params["what"], await request.json()))
        except (LookupError, TypeError, ValueError, OSError) as error:
            return PlainTextResponse(f"Not understood: {error}\n", 400)

    def act(what: str, sent: dict[str, Any]) -> dict[str, Any]:
        client, images = str(sent["client"])[:64], session.images
        acts: dict[str, Callable[[], dict[str, Any]]] = {
            "answer": lambda: answered({int(i): str(decision) for i, decision in sent["decisions"].items()}, client),
            "alike": lambda: page_state(session.alike(client, int(sent["index"]), str(sent["by"]))),
            "chosen": lambda: page_state(session.chosen(client, [images[int(i)].index for i in sent["images"]])),
            "page": lambda: page_state(session.page(int(sent["number"])) or session.next_page(client)),
            "next": lambda: page_state(session.next_page(client)),
            "map": lambda: _map(session),
            "finish": lambda: _finished(session),
        }
        return acts[what]()

    def answered(decisions: dict[int, str], client: str) -> dict[str, Any]:
        session.answer(decisions, client)
        return {"standing": session.standing()._asdict()}

    def picture(request: Request) -> Response:
        index, kind = request.path_params["index"], request.path_params["kind"]
        try:
            name = session.images[index].path
            if kind == "full":
                return _full(session.root / name)
            if kind == "map":
                return _kept(pictures.layer(index), "image/png")
            return _kept(pictures.small({"small": name, "nearest": pictures.nearest[index]}[kind]), "image/jpeg")
        except (LookupError, StopIteration):
            return PlainTextResponse("There is no such picture.\n", 404)
        except FileNotFoundError:
            return PlainTextResponse("The file is no longer there.\n", 404)
        except (OSError, UnreadableImageError) as error:
            return PlainTextResponse(f"The file can't be read ({getattr(error, 'reason', error)}).\n", 404)

    routes = [
        Route("/", shown),
        Route("/do/{what:str}", post, methods=["POST"]),
        Route("/image/{index:int}/{kind:str}", picture),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    return Guard(Starlette(routes=[Mount(f"/{token}", routes=routes)]), hosts, around)


def _map(session: Session) -> dict[str, Any]:
    """Where each image lies, and what it may be coloured by; no places where the curation stored no features."""
    plane = [] if session.plane is None else session.plane.round(4).tolist()
    ranks = rankdata(np.nan_to_num(session.scores, nan=-np.inf)) / len(session.images)
    decisions = [session.answers.get(image.index, "") for image in session.images]
    return {
        "places": plane,
        "score": ranks.round(4).tolist(),
        "decision": decisions,
        "variant": np.nan_to_num(session.variants).astype(int).tolist(),
        "names": [image.path for image in session.images],
    }


def _finished(session: Session) -> dict[str, Any]:
    """Manifest and report brought up to date, and what to type next."""
    from anomalib_metarefine.curation.review.finish import finish, next_commands

    manifest = finish(session.folder)
    written = [str(path.resolve()) for path in (manifest_file(session.folder), session.folder / REPORT_FILE)]
    return {"verdict": manifest.verdict, "written": written, "commands": next_commands(session.folder)}


def _full(path: Path) -> Response:
    """The file itself where a browser can show it, else converted."""
    with Pillow.open(path) as opened:
        kind, mode = opened.format, opened.mode
    if mode in _SHOWN_AS_IT_IS.get(kind, ()):
        return FileResponse(path, media_type=Pillow.MIME[kind])
    return Response(_encoded(thumbnail(path, _FULL), "PNG"), media_type="image/png")


def _kept(content: bytes, kind: str) -> Response:
    return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=86400"})


def _encoded(image: Pillow.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88) if kind == "JPEG" else image.save(buffer, kind)
    return buffer.getvalue()
