"""The review page in a real browser, by keyboard alone (skipped where there is no Chromium)."""

import csv
import re
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("starlette", reason="The extra `review` is not installed.")

from anomalib_metarefine.curation.curate import Curation
from anomalib_metarefine.images.answers import DECISIONS_FILE, load
from tests.curation.made_up import ODD_NAMES, make

ODD = [*ODD_NAMES, "<img src=x onerror=alert(1)>.png", "缺陷 样品.png", 'it\'s "quoted".png']


NEW_PAGE_OR_END = """!document.querySelector('.card:not([data-decision=""])')"""


class Server:
    """``metarefine review`` in a process of its own."""

    def __init__(self, folder):
        command = [sys.executable, "-u", "-m", "anomalib_metarefine.cli", "review", str(folder), "--no-browser"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        self.address = re.search(r"http\S+", self.process.stdout.readline())[0]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def serve(request):
    def start(folder):
        server = Server(folder)
        request.addfinalizer(server.kill)
        return server

    return start


@pytest.fixture
def folder(tmp_path):
    """300 images, of which 60 are dirty: those under bad/, and those with odd names."""
    manifest, evidence = make(tmp_path / "images", keep=240, reject=60, review=0, names=ODD)
    Curation(manifest, evidence).write(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def tab(browser):
    """Opens pages; fails on any console message, script error or request elsewhere."""
    pages, complaints = [], []

    def opened(address, **settings):
        page = browser.new_context(**settings).new_page()
        pages.append(page)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        origin = address.rsplit("/", 2)[0]
        page.on("request", lambda r: None if r.url.startswith((origin, "data:")) else complaints.append(r.url))
        page.goto(address)
        page.wait_for_selector(".card")
        return page

    yield opened
    for page in pages:
        page.context.close()
    assert complaints == []


def is_dirty(name):
    return name.startswith("bad/") or name in ODD


def names(page):
    return page.eval_on_selector_all(".card", "all => all.map(c => c.querySelector('.name').textContent)")


def framed(page):
    return page.evaluate("document.activeElement.querySelector('.name')?.textContent")


def until(page, expression):
    """Wait for a condition; the page's own policy forbids Playwright's way, which evaluates text inside of it."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def settled(page, looked):
    until(page, f"document.querySelector('#standing b')?.textContent === '{looked}'")


def review_a_page(page, before):
    """Reject what is dirty, then the rest is good; answers what was decided."""
    shown = names(page)
    for place, name in enumerate(shown):
        page.keyboard.press("r" if is_dirty(name) else "ArrowRight")
        if is_dirty(name):
            settled(page, before + sum(map(is_dirty, shown[: place + 1])))
            if place + 1 < len(shown):
                assert framed(page) == shown[place + 1]
    page.keyboard.press("g")
    settled(page, before + len(shown))
    return {name: "reject" if is_dirty(name) else "keep" for name in shown}


def test_300_images_to_the_end_with_a_kill_in_the_middle(folder, serve, tab):
    server = serve(folder)
    page = tab(server.address)
    decided = {}
    while len(decided) < 120:
        decided |= review_a_page(page, len(decided))
        until(page, NEW_PAGE_OR_END)
    page.keyboard.press("k")
    settled(page, len(decided) + 1)
    decided |= {names(page)[0]: "keep"}
    server.kill()
    page.keyboard.press("k")
    page.wait_for_selector("#trouble:visible")
    assert "Not saved" in page.inner_text("#trouble")
    paths = _paths(folder)
    assert {paths[sha256]: decision for sha256, decision in load(folder).items()} == decided

    page = tab(serve(folder).address)
    settled(page, len(decided))
    while page.is_hidden("#end"):
        decided |= review_a_page(page, len(decided))
        until(page, NEW_PAGE_OR_END)
    assert len(decided) == 300
    assert (
        " ".join(page.inner_text("#standing").split())
        == "Looked at 300 of 300 · found 60 · left about 0 (at most 0, 95 %)"
    )
    assert "You can stop. Every image was looked at." in page.inner_text("#verdict")
    assert {paths[sha256]: decision for sha256, decision in load(folder).items()} == decided


def _paths(folder):
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return {row["sha256"]: row["image_path"] for row in csv.DictReader(file)}


def test_what_is_left_is_not_told_before_somebody_has_looked_at_a_few(folder, serve, tab):
    page = tab(serve(folder).address)

    def said():
        return " ".join(page.inner_text("#standing").split())

    assert said() == "Looked at 0 of 300 · found 0 · left: not known yet"
    page.keyboard.press("k")
    settled(page, 1)
    assert said().endswith("not known yet")
    page.keyboard.press("g")
    settled(page, 12)
    assert "· left about" in said()


def test_two_browsers_at_once_lose_nothing(folder, serve, tab):
    address = serve(folder).address
    one, two = tab(address), tab(address)
    first, second = names(one), names(two)
    assert not set(first) & set(second)
    for _ in range(5):
        one.keyboard.press("k")
        two.keyboard.press("R")
    one.keyboard.press("G")
    two.keyboard.press("b")
    settled(one, 24)
    settled(two, 24)
    paths = _paths(folder)
    expected = dict.fromkeys(first, "keep") | dict.fromkeys(second, "reject")
    assert {paths[sha256]: decision for sha256, decision in load(folder).items()} == expected


def test_undo_crosses_pages_and_a_reload_keeps_the_place(folder, serve, tab):
    page = tab(serve(folder).address)
    first = names(page)
    page.keyboard.press("r")
    settled(page, 1)
    page.reload()
    page.wait_for_selector(".card[data-decision=reject]")
    assert names(page) == first
    assert framed(page) == first[1]
    page.keyboard.press("g")
    settled(page, 12)
    until(page, f"document.querySelector('.name').textContent !== {first[0]!r}")
    second = names(page)
    page.keyboard.press("u")
    settled(page, 1)
    assert names(page) == first
    page.keyboard.press("g")
    settled(page, 12)
    until(page, f"document.querySelector('.name').textContent !== {first[0]!r}")
    assert names(page) == second


def test_odd_names_pictures_and_the_map(folder, serve, tab):
    page = tab(serve(folder).address)
    shown = names(page)
    assert set(ODD) & set(shown) == set(ODD)  # they have the highest scores
    loaded = "[...document.querySelectorAll('.card img')].every(i => i.complete && i.naturalWidth)"
    until(page, loaded)
    page.wait_for_selector(".card .map", state="attached")
    assert not page.locator(".map").first.is_visible()
    page.keyboard.press("M")
    assert page.locator(".card .map").first.is_visible()
    page.keyboard.press("f")
    until(page, "document.querySelector('#full img').naturalWidth === 32")
    page.keyboard.press("r")  # decides from there, and closes
    settled(page, 1)
    assert not page.is_visible("#full")
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("Escape")
    assert not page.is_visible("#keys")


def test_a_key_that_fails_says_so_and_the_others_go_on(folder, serve, tab):
    page = tab(serve(folder).address)
    page.evaluate("window.plane = { draw() { throw new Error('no canvas'); } }")
    page.keyboard.press("a")
    page.get_by_text("This page has failed (no canvas). Reload it").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.locator('.card[data-decision="reject"]').wait_for()


def test_a_lasso_opens_images_and_space_leads_back(folder, serve, tab):
    page = tab(serve(folder).address)
    first = names(page)
    page.keyboard.press("a")
    until(page, "document.querySelector('#plane').width > 300")
    box = page.locator("#plane").bounding_box()
    left, top, right, bottom = box["x"] + 2, box["y"] + 2, box["x"] + box["width"] - 2, box["y"] + box["height"] - 2
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y, steps=4)
    page.mouse.up()
    until(page, "document.querySelectorAll('.card').length === 60")  # all were in it; a page holds 60
    assert not page.is_visible("#all")
    assert set(ODD) <= set(names(page))
    page.keyboard.press(" ")
    until(page, "document.querySelectorAll('.card').length === 12")
    assert names(page) == first


def test_finish_by_keyboard(tmp_path, serve, tab):
    folder = tmp_path / "out"
    Curation(*make(tmp_path / "images", keep=20)).write(folder)
    page = tab(serve(folder).address)
    page.keyboard.press("r")
    settled(page, 1)
    held = []
    page.route("**/do/finish", lambda route: held.append(route))  # noqa: PLW0108  (a method has no signature to ask)
    page.keyboard.press("e")
    page.get_by_text("One moment: manifest and report are being written.").wait_for()
    assert not page.is_visible("#commands")
    held.pop().continue_()
    page.wait_for_selector("#commands:visible")
    train, apply = page.inner_text("#commands").splitlines()
    assert train.startswith("metarefine train --curation ")
    assert apply.startswith("metarefine apply ")
    assert "A person has looked at 1, and found 1 dirty." in page.inner_text("#said")
    assert ",user," in (folder / "manifest.csv").read_text(encoding="utf-8")
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    settled(page, 2)


@pytest.mark.parametrize(("width", "scheme"), [(420, "dark"), (1400, "light")])
def test_nothing_runs_over_the_side_and_touch_works(folder, serve, tab, width, scheme):
    view = {"width": width, "height": 900}
    page = tab(serve(folder).address, viewport=view, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".card [data-do=reject]").nth(1).tap()
    settled(page, 1)
    page.locator("footer [data-do=good]").tap()
    settled(page, 12)


def test_a_foreign_page_is_refused(folder, serve, tab, browser):
    address = serve(folder).address
    tab(address)
    foreign = browser.new_page()
    foreign.route("http://evil.example/", lambda route: route.fulfill(body="<p>evil</p>", content_type="text/html"))
    foreign.goto("http://evil.example/")
    post = """address => fetch(address + "do/answer", {method: "POST", mode: "no-cors",
              body: JSON.stringify({client: "x", decisions: {0: "reject"}})}).then(() => 1, () => 0)"""
    foreign.evaluate(post, address)
    foreign.close()
    assert not (folder / DECISIONS_FILE).exists()
