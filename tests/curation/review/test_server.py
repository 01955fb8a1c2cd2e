"""The session and its server: what is on disk, who is let in, what a browser gets."""

import asyncio
import dataclasses
import json
import shlex

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="The extra `review` is not installed.")

from anomalib_metarefine.curation.curate import Curation
from anomalib_metarefine.curation.decisions import append
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.review.pages import PAGES_FILE
from anomalib_metarefine.curation.review.server import make_app
from anomalib_metarefine.curation.review.session import PAGE_SIZE, Session
from anomalib_metarefine.images.answers import DECISIONS_FILE, Answer, load
from tests.curation.made_up import make

HOST = "127.0.0.1:8000"


def curated(tmp_path, **settings):
    manifest, evidence = make(tmp_path / "images", **settings)
    Curation(manifest, evidence).write(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def folder(tmp_path):
    return curated(tmp_path, keep=40, reject=6, review=4, groups=[0] * 5 + [-1] * 5)


def call(app, path, body=None, **headers):
    """Status, headers and body of one request, straight to the application."""
    sent, received = [], []
    content = b"" if body is None else json.dumps(body).encode()
    headers = {"host": HOST, "content-length": str(len(content)), **headers}
    if body is not None:
        headers.setdefault("origin", f"http://{HOST}")
    scope = {
        "type": "http",
        "method": "GET" if body is None else "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items() if value is not None],
        "http_version": "1.1",
        "scheme": "http",
        "root_path": "",
    }

    async def receive():
        if received:  # as a browser that stays
            await asyncio.Event().wait()
        received.append(1)
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}, answer


@pytest.fixture
def app(folder):
    return make_app(Session(folder, "me", seed=0), "secret", {HOST})


class TestSession:
    def test_the_highest_scores_come_first_and_some_at_random(self, folder):
        session = Session(folder, seed=0)
        page = session.next_page("a")
        scores = [session.images[i].row["score"] for i in page.images if i not in page.audit]
        highest = sorted((image.row["score"] for image in session.images), reverse=True)
        assert sorted(scores, reverse=True) == highest[: len(scores)]
        assert len(page.images) == PAGE_SIZE
        assert len(page.audit) == 2
        assert not set(page.audit) & {i for i in page.images if i not in page.audit}

    def test_no_image_is_shown_twice_and_all_are_shown(self, folder):
        session, shown = Session(folder, seed=0), []
        while page := session.next_page("a"):
            shown += page.images
            session.answer(dict.fromkeys(page.images, "keep"))
        assert sorted(shown) == list(range(50))
        assert session.standing().looked == session.standing().total == 50

    def test_answers_are_lines_that_another_session_reads(self, folder):
        session = Session(folder, "Jö", seed=0)
        session.answer({3: "reject", 4: "keep"})
        session.answer({4: ""})
        lines = (folder / DECISIONS_FILE).read_text(encoding="utf-8").splitlines()
        assert lines[0] == "image_path,sha256,decision,when,by"
        assert len(lines) == 4
        assert lines[1].startswith(f"{session.images[3].path},{session.images[3].sha256},reject,2")
        assert lines[1].endswith(",Jö")
        assert Session(folder).answers == {3: "reject"}
        with pytest.raises(ValueError, match="found 'perhaps' for 1"):
            session.answer({1: "perhaps"})

    def test_two_sessions_on_one_folder_see_each_other(self, folder):
        one, two = Session(folder, seed=0), Session(folder, seed=1)
        first, second = one.next_page("a"), two.next_page("b")
        assert not set(first.images) & set(second.images)
        one.answer(dict.fromkeys(first.images, "keep"))
        two.answer(dict.fromkeys(second.images, "reject"))
        assert one.standing() == two.standing()
        assert one.standing().looked == 24
        assert one.standing().found == 12

    def test_half_a_line_from_a_kill_costs_nothing_else(self, folder):
        session = Session(folder, seed=0)
        page = session.next_page("a")
        session.answer({page.images[0]: "reject"})
        with (folder / PAGES_FILE).open("a") as file:
            file.write('{"kind": "order", "cli')
        again = Session(folder, seed=0)
        assert again.answers == {page.images[0]: "reject"}
        assert again.page(page.number) == page
        second = again.next_page("b")
        assert not set(second.images) & set(page.images)
        assert Session(folder).page(second.number) == second

    def test_answers_from_elsewhere_are_no_draws(self, folder):
        known = Session(folder).images[7]
        append(folder, [Answer(known.path, known.sha256, "keep")])
        session = Session(folder, seed=0)
        assert session.standing().looked == 1
        assert session.standing().audited == 0
        assert not any(7 in session.next_page("a").images for _ in range(3))

    def test_what_was_left_undecided_comes_back_at_the_end(self, folder):
        session = Session(folder, seed=0)
        left = session.next_page("a").images[5]
        while (page := session.next_page("a")).kind == "order":
            pass
        assert left in page.images
        session.answer(dict.fromkeys(range(50), "keep"))
        assert session.next_page("a") is None

    def test_copies_are_one_image(self, tmp_path):
        manifest, evidence = make(tmp_path / "images", keep=5, reject=2, review=0)
        manifest.table.loc[:2, "sha256"] = "same"
        Curation(manifest, evidence).write(tmp_path / "out")
        session = Session(tmp_path / "out")
        assert len(session.images) == 5
        copies = next(image for image in session.images if len(image.paths) == 3)
        session.answer({copies.index: "reject"})
        assert len((tmp_path / "out" / DECISIONS_FILE).read_text().splitlines()) == 4
        assert load(tmp_path / "out") == {"same": "reject"}

    def test_look_alikes_are_shown_together_the_nearest_first(self, tmp_path):
        manifest, evidence = make(tmp_path / "images", keep=30, reject=6, review=0)
        kind = np.zeros((36, 16))
        kind[30:35, 0] = np.linspace(30, 20, 5)  # five rejected images are unusual in the same way
        evidence = dataclasses.replace(evidence, features=(evidence.features + kind).astype(np.float16))
        Curation(manifest, evidence).write(tmp_path / "out")
        session = Session(tmp_path / "out", seed=0)
        index = {image.path: image.index for image in session.images}
        like = [index[name] for name in evidence.images[30:35]]
        page = session.alike("a", like[2])
        assert page.images[0] == like[2]
        assert set(like) == set(page.images)
        session.answer({like[0]: "reject"})
        assert like[0] not in session.undecided_alike(like[2])
        assert not set(like) & set(session.undecided_alike(index[evidence.images[3]]))

    def test_near_duplicates_are_alike_whatever_their_features(self, tmp_path):
        found = {"good/00001.png": "near duplicate of good/00000.png", "good/00003.png": "dark"}
        session = Session(curated(tmp_path, keep=20, quality=found))
        first, second = (next(i.index for i in session.images if i.path == f"good/0000{n}.png") for n in (0, 1))
        assert session.undecided_alike(first) == [first, second]

    def test_a_small_variant_is_a_group_and_the_largest_is_none(self, tmp_path):
        manifest, evidence = make(tmp_path / "images", keep=20, reject=2, review=0)
        manifest.table.loc[3:7, "variant"] = 1
        Curation(manifest, evidence).write(tmp_path / "out")
        session = Session(tmp_path / "out")
        small = [image.index for image in session.images if image.row["variant"] == 1]
        assert session.undecided_alike(small[1], "variant") == small
        assert session.undecided_alike(0, "variant") == [0]

    def test_tomorrow_it_asks_only_about_what_is_new(self, tmp_path):
        session = Session(curated(tmp_path, keep=8, reject=2, review=0), seed=0)
        for page in iter(lambda: session.next_page("a"), None):
            session.answer(dict.fromkeys(page.images, "keep"))
        tomorrow = Session(curated(tmp_path, keep=11, reject=2, review=0), seed=0)
        assert tomorrow.standing().looked == 10
        asked = [tomorrow.images[i].path for i in tomorrow.next_page("b").images]
        assert sorted(asked) == ["good/00008.png", "good/00009.png", "good/00010.png"]

    def test_random_images_become_more_once_nothing_dirty_comes(self, folder):
        session = Session(folder, seed=0)
        for _ in range(2):
            session.answer(dict.fromkeys(session.next_page("a").images, "keep"))
        assert len(session.next_page("a").audit) == 6

    def test_draws_say_nothing_about_images_that_came_later(self, folder):
        session = Session(folder, seed=0)
        for _ in range(2):
            session.answer(dict.fromkeys(session.next_page("a").images, "keep"))
        before = session.standing()
        later = session.manifest.table.iloc[:1].assign(image_path="new.png", sha256="new")
        manifest = Manifest(pd.concat([session.manifest.table, later]), session.manifest.run)
        Curation(manifest, session.evidence).write(folder)
        after = Session(folder).standing()
        assert (before.audited, after.audited) == (4, 0)
        assert (before.looked, after.looked) == (24, 24)
        assert after.at_most == 51 - 24

    def test_a_folder_without_a_manifest(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="metarefine curate"):
            Session(tmp_path)


class TestServer:
    def test_only_with_the_token_the_host_and_the_origin(self, app):
        assert call(app, "/secret/")[0] == 200
        assert call(app, "/")[0] == 404
        assert call(app, "/wrong/do/next", {"client": "a"})[0] == 404
        assert call(app, "/secret/", host="evil.example:8000")[0] == 403
        assert call(app, "/secret/", origin="http://evil.example")[0] == 403
        for origin in ("http://evil.example", "null", f"https://{HOST}", None):
            assert call(app, "/secret/do/next", {"client": "a"}, origin=origin)[0] == 403
        assert call(app, "/secret/do/next", {"client": "a"})[0] == 200

    def test_a_foreign_page_changes_nothing(self, app, folder):
        before = sorted(folder.iterdir())
        call(app, "/secret/do/answer", {"client": "a", "decisions": {"0": "reject"}}, origin="http://evil.example")
        assert sorted(folder.iterdir()) == before

    def test_answers_and_pages(self, app, folder):
        state = json.loads(call(app, "/secret/do/next", {"client": "a"})[2])
        assert len(state["page"]["cards"]) == PAGE_SIZE
        assert "audit" not in json.dumps(state["page"])
        index = state["page"]["cards"][0]["index"]
        status, _, body = call(app, "/secret/do/answer", {"client": "a", "decisions": {index: "reject"}})
        assert status == 200
        assert json.loads(body)["standing"]["found"] == 1
        assert list(load(folder).values()) == ["reject"]
        again = json.loads(call(app, "/secret/do/page", {"client": "a", "number": 0})[2])
        assert again["page"]["cards"][0]["decision"] == "reject"

    def test_a_lasso_opens_what_it_holds_answered_or_not(self, app, folder):
        places = json.loads(call(app, "/secret/do/map", {"client": "a"})[2])
        assert len(places["places"]) == len(places["names"]) == 50
        assert np.ptp(places["places"], axis=0).tolist() == [1, 1]
        call(app, "/secret/do/answer", {"client": "a", "decisions": {"7": "keep"}})
        page = json.loads(call(app, "/secret/do/chosen", {"client": "a", "images": [7, 3, 40]})[2])["page"]
        assert [(card["index"], card["decision"]) for card in page["cards"]] == [(7, "keep"), (3, ""), (40, "")]
        assert json.loads(call(app, "/secret/do/map", {"client": "a"})[2])["decision"][7] == "keep"

    def test_a_curation_without_features_has_no_map_and_says_so(self, tmp_path):
        manifest, evidence = make(tmp_path / "images")
        Curation(manifest, dataclasses.replace(evidence, images=[], features=np.zeros((0, 0)))).write(tmp_path / "out")
        app = make_app(Session(tmp_path / "out"), "t", {HOST})
        assert json.loads(call(app, "/t/do/map", {"client": "a"})[2])["places"] == []
        assert json.loads(call(app, "/t/do/next", {"client": "a"})[2])["page"]["cards"]

    def test_finish_brings_everything_up_to_date(self, app, folder):
        name = Session(folder).images[3].path
        call(app, "/secret/do/answer", {"client": "a", "decisions": {"3": "reject"}})
        said = json.loads(call(app, "/secret/do/finish", {"client": "a"})[2])
        row = Manifest.read(folder).table.set_index("image_path").loc[name]
        assert (row.decision, row.decided_by) == ("reject", "user")
        assert said["verdict"] == Manifest.read(folder).verdict
        train, apply = map(shlex.split, said["commands"])
        assert apply == [
            "metarefine",
            "apply",
            str(folder.resolve()),
            *["--to", str(folder.resolve().with_name("out-clean")), "--review", "keep"],
        ]
        assert train == ["metarefine", "train", "--curation", apply[2], "--out", apply[4].replace("clean", "model")]

    @pytest.mark.parametrize(
        ("what", "body"),
        [
            ("chosen", {"client": "a", "images": [999]}),
            ("next", {}),
            ("answer", {"client": "a", "decisions": {"999": "keep"}}),
            ("delete", {"client": "a"}),
        ],
    )
    def test_nonsense_is_refused(self, app, what, body):
        assert call(app, f"/secret/do/{what}", body)[0] == 400

    def test_every_page_says_what_it_may_load_and_names_hold_no_markup(self, app):
        _, headers, body = call(app, "/secret/")
        assert b"<title>Review: line &lt;7&gt;</title>" in body
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["referrer-policy"] == "no-referrer"
        for name in ("review.js", "plane.js", "review.css"):
            status, _, body = call(app, f"/secret/static/{name}")
            assert status == 200
            assert b"//cdn" not in body
            assert b"https:" not in body

    def test_pictures(self, app, folder):
        session = Session(folder)
        rejected = next(image for image in session.images if image.row["decision"] == "reject")
        kept = next(image for image in session.images if image.row["decision"] == "keep")
        for kind, content_type in (
            ("small", "image/jpeg"),
            ("map", "image/png"),
            ("nearest", "image/jpeg"),
            ("full", "image/png"),
        ):
            status, headers, body = call(app, f"/secret/image/{rejected.index}/{kind}")
            assert (status, headers["content-type"]) == (200, content_type)
            assert body
        assert call(app, f"/secret/image/{kept.index}/map")[0] == 404
        assert call(app, "/secret/image/999/small")[0] == 404
        (session.root / rejected.path).unlink()
        assert call(app, f"/secret/image/{rejected.index}/full")[::2] == (404, b"The file is no longer there.\n")

    def test_what_no_browser_shows_is_converted(self, tmp_path):
        manifest, evidence = make(tmp_path / "images", keep=2, reject=1, review=0)
        name = manifest.table.image_path[0]
        deep = Image.fromarray((np.linspace(0, 4095, 600 * 400).reshape(400, 600)).astype(np.uint16))
        deep.save(tmp_path / "images" / name, format="TIFF")
        Curation(manifest, evidence).write(tmp_path / "out")
        session = Session(tmp_path / "out")
        index = next(image.index for image in session.images if image.path == name)
        _, headers, body = call(make_app(session, "t", {HOST}), f"/t/image/{index}/full")
        assert headers["content-type"] == "image/png"
        import io

        shown = Image.open(io.BytesIO(body))
        assert shown.size == (600, 400)
        assert np.ptp(np.asarray(shown)) == 255
