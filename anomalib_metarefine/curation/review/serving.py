"""A review's server on a port: until Ctrl-C, or beside a notebook."""

from __future__ import annotations

import html
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from anomalib_metarefine.curation.review.server import make_app
from anomalib_metarefine.curation.review.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_START_S = 10
_NOTEBOOKS = "http://localhost:* http://127.0.0.1:*"  # pages that may show a review inside of them
_HEIGHT = 800  # pixels of a review inside a notebook


def serve(
    session: Session, host: str = "127.0.0.1", port: int = 0, opened: Callable[[str], None] | None = None
) -> None:
    """Serve until Ctrl-C.

    Args:
        session (Session): The review.
        host (str): Address to listen on.
        port (int): 0 takes a free one.
        opened (Callable[[str], None] | None): Called with the page's address once it can be opened.

    Raises:
        OSError: If the port is taken.
    """
    server, listener, address = _prepared(session, host, port)
    if opened is not None:
        threading.Timer(0.3, opened, [address]).start()
    with suppress(KeyboardInterrupt):  # uvicorn has ended cleanly by then, and hands the signal on
        server.run(sockets=[listener])


@dataclass(frozen=True)
class Review:
    """A review that is served beside a notebook, which shows it, and a link for notebooks that show no other page.

    Attributes:
        session (Session): Where it stands: ``review.session.standing()``.
        address (str): Of the page; it holds a secret.
    """

    session: Session
    address: str
    _server: uvicorn.Server
    _thread: threading.Thread

    def stop(self) -> None:
        """End the server; every answer is on the disk already."""
        self._server.should_exit = True
        self._thread.join(_START_S)

    def _repr_html_(self) -> str:
        address = html.escape(self.address)
        return (
            f'<iframe src="{address}" width="100%" height="{_HEIGHT}"></iframe>'
            f'<a href="{address}" target="_blank" rel="noopener">Review {len(self.session.images)} images</a>'
        )

    def __repr__(self) -> str:
        return f"<Review of {len(self.session.images)} images at {self.address}>"


def review(folder: str | Path, by: str = "") -> Review:
    """Serve the review of a curation from a thread, see `Manifest.review`."""
    session = Session(folder, by)
    server, listener, address = _prepared(session, "127.0.0.1", 0, _NOTEBOOKS)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True, name="metarefine review")
    thread.start()
    return Review(session, address, server, thread)  # the listener queues who comes before the server is up


def _prepared(
    session: Session, host: str, port: int, around: str = "'none'"
) -> tuple[uvicorn.Server, socket.socket, str]:
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    named = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    token = secrets.token_urlsafe(16)
    app = make_app(session, token, {f"{name}:{port}" for name in {*_LOCAL, named, *_names(host)}}, around)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    return uvicorn.Server(config), listener, f"http://{named}:{port}/{token}/"


def _names(host: str) -> set[str]:
    """What others may call this machine by, if it listens to them."""
    if host in (*_LOCAL, "::1"):
        return set()
    name = socket.gethostname()
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    return {name, socket.getfqdn(), *(f"[{address}]" if ":" in address else address for address in found)}
