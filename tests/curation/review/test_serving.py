"""A review beside a notebook."""

import functools
import http.server
import sys
import threading
import urllib.error
import urllib.request

import pytest

pytest.importorskip("starlette", reason="The extra `review` is not installed.")

from anomalib_metarefine.curation.curate import Curation
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.images.answers import load
from tests.curation.made_up import make


def test_a_notebook_goes_on_while_the_page_is_served(tmp_path):
    Curation(*make(tmp_path / "images")).write(tmp_path / "out")
    running = Manifest.read(tmp_path / "out").review(by="me")
    try:
        with urllib.request.urlopen(running.address, timeout=20) as answer:
            assert b"<title>Review: line &lt;7&gt;</title>" in answer.read()
        assert f'href="{running.address}"' in running._repr_html_()  # where a notebook shows no other page
        assert running.session.standing().total == 13
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(running.address.rsplit("/", 2)[0] + "/guess/", timeout=20)
    finally:
        running.stop()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(running.address, timeout=20)


def test_a_manifest_that_lies_nowhere_and_a_missing_extra(tmp_path, monkeypatch):
    curation = Curation(*make(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"lies in no folder yet.*curation\.write"):
        curation.manifest.review()
    curation.write(tmp_path / "out")
    curation.manifest.review().stop()
    monkeypatch.delitem(sys.modules, "anomalib_metarefine.curation.review.serving")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs uvicorn: pip install 'anomalib-metarefine\[review\]'"):
        curation.manifest.review()


@pytest.mark.parametrize(("host", "shown"), [("localhost", True), ("notebook.example", False)])
def test_a_notebook_shows_the_page_inside_of_it(tmp_path, browser, host, shown):
    """The notebook is a page of another port of this machine, and of another machine."""
    curation = Curation(*make(tmp_path / "images"))
    curation.write(tmp_path / "out")
    running = curation.manifest.review()
    (tmp_path / "notebook").mkdir()
    (tmp_path / "notebook" / "index.html").write_text(f"<!doctype html>{running._repr_html_()}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "notebook")
    notebook = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=notebook.serve_forever, daemon=True).start()
    page = browser.new_page()
    try:
        page.route("http://notebook.example/**", lambda route: route.fulfill(path=tmp_path / "notebook" / "index.html"))
        page.goto(f"http://{host}:{notebook.server_port}/" if shown else f"http://{host}/")
        frame = page.frame_locator("iframe")
        if shown:
            frame.locator(".card").first.wait_for()
            frame.locator("body").press("r")
            frame.locator('.card[data-decision="reject"]').wait_for()
            assert list(load(tmp_path / "out").values()) == ["reject"]
        else:
            page.wait_for_load_state("networkidle")
            assert frame.locator(".card").count() == 0
    finally:
        page.close()
        notebook.shutdown()
        running.stop()
