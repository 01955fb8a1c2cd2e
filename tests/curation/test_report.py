"""The report: what is in the file, and how it behaves in a real browser (skipped where there is no Chromium)."""

import hashlib
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_metarefine.curation import charts, report
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.pictures import thumbnail
from anomalib_metarefine.curation.report import write_report
from anomalib_metarefine.images.answers import read
from tests.curation.made_up import ODD_NAMES, make, unusual_in


class Page(HTMLParser):
    """Text and attributes of a page, as a browser would read them."""

    def __init__(self, path: Path):
        super().__init__()
        self.words, self.tags = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, attribute):
        return [attributes[attribute] for name, attributes in self.tags if name == tag and attribute in attributes]


def written(tmp_path, **settings) -> Page:
    return Page(write_report(*make(tmp_path / "images", **settings), tmp_path / "out" / "report.html"))


def test_says_what_was_found(tmp_path):
    page = written(tmp_path, quality={"good/00001.png": "blurred; near duplicate of good/00002.png"})
    assert "4 of 13 images (30.8 %) were rejected, and 3 more are doubtful." in page.text
    assert "Photographs of one kind of part." in page.text
    assert "the kept set no longer changed" in page.text
    assert "Histogram of 13 image scores" in page.text
    assert "near duplicate of good/00002.png" in page.text
    assert "f00d" in page.text


def test_the_highest_scores_come_first_whatever_was_decided(tmp_path):
    manifest, evidence = make(tmp_path, keep=40, reject=0, review=0)
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    shown = [attributes["data-path"] for tag, attributes in page.tags if "data-path" in attributes]
    expected = manifest.table.sort_values("score", ascending=False).image_path.tolist()
    assert shown == expected[:24]
    assert "Nothing was rejected." in page.text


def test_nothing_says_likely_dirty_before_somebody_has_looked(tmp_path):
    for settings in ({}, {"reject": 0}):
        text = written(tmp_path, **settings).text
        assert "likely dirty" not in text
        assert "probability" not in text
    manifest, evidence = make(tmp_path)
    manifest.table.loc[0, "variant"] = 1
    assert "variant 1" in Page(write_report(manifest, evidence, tmp_path / "report.html")).text
    assert "variant 0" not in written(tmp_path).text


def test_is_one_file_and_asks_for_nothing_else(tmp_path):
    page = written(tmp_path)
    sources = page.all("img", "src")
    assert len(sources) == 6 + 3 * (4 + 3)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(link.startswith(("#", "data:")) for tag in ("a", "link", "use") for link in page.all(tag, "href"))
    assert not page.all("script", "src")
    assert all("alt" in attributes for tag, attributes in page.tags if tag == "img")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = " ".join(attributes.get("aria-labelledby", "") for _, attributes in page.tags).split()
    assert set(referred) <= set(ids)
    assert {link[1:] for link in page.all("a", "href")} <= set(ids)


def test_odd_names_are_shown_as_they_are(tmp_path):
    page = written(tmp_path, reject=5, names=ODD_NAMES)
    assert set(ODD_NAMES) <= set(page.all("div", "data-path"))
    assert not page.all("b", "bold")
    assert "49" not in [word.strip() for word in page.words if "7 * 7" in word]


def test_a_source_that_is_no_unicode_is_written_all_the_same(tmp_path):
    manifest, evidence = make(tmp_path)
    manifest.run["source"] = "line\udcff7"
    assert "Curation report" in Page(write_report(manifest, evidence, tmp_path / "report.html")).text


def test_missing_and_broken_images_are_named_not_fatal(tmp_path):
    manifest, evidence = make(tmp_path)
    (tmp_path / "bad/00000.png").unlink()
    (tmp_path / "near/00000.png").write_bytes(b"no image")
    evidence.nearest[1] = ""
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert page.text.count("The file is no longer there.") == 1
    assert page.text.count("The file can't be read (") == 1
    assert page.text.count("No image to lay the map on.") == 2
    assert len(page.all("img", "src")) == 6 + 3 * 7 - 5


def test_unusual_places_stand_beside_what_repair_makes_of_them(tmp_path):
    manifest, evidence = make(tmp_path)
    evidence = unusual_in(evidence, "good/00001.png", "near/00000.png", "bad/00000.png")
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert "2 images have regions that lie further from their like" in page.text  # the third is rejected
    assert f"metarefine apply {tmp_path} --to DIR --mode repair" in page.text
    alts = [alt for alt in page.all("img", "alt") if alt.endswith((": unusual places", ": repaired"))]
    names = ("good/00001.png", "near/00000.png")
    assert alts == [f"{name}: {what}" for name in names for what in ("unusual places", "repaired")]
    assert page.all("div", "data-path").count("good/00001.png") == 2  # a card with buttons of its own
    assert "#unusual" in page.all("a", "href")
    (tmp_path / "good/00003.png").unlink()
    gone = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert "Not all images are where they were, so there are no pictures." in gone.text
    assert "Unusual places" not in written(tmp_path).text


def test_a_persons_decision_is_told_from_the_rules(tmp_path):
    manifest, evidence = make(tmp_path, reject=2)
    manifest.table.loc[manifest.table.image_path == "bad/00001.png", "decided_by"] = "user"
    text = Page(write_report(manifest, evidence, tmp_path / "report.html")).text
    assert text.count("by you") == 1
    assert "bad/00001.png rejected by you score 5.0" in text


def test_unreadable_files_have_a_table_of_their_own(tmp_path):
    manifest, evidence = make(tmp_path)
    row = manifest.table.image_path == "bad/00003.png"
    manifest.table.loc[row, ["score", "fence_distance", "q_value", "score_round_1"]] = np.nan
    manifest.table.loc[row, ["decided_by", "reason"]] = ["unreadable", "The file is empty."]
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert "Files that could not be read" in page.text
    assert "bad/00003.png The file is empty." in page.text
    assert "bad/00003.png" not in page.all("div", "data-path")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"keep": 10, "reject": 0, "review": 0}, ["Nothing was rejected.", "Most suspicious images"]),
        ({"keep": 0, "reject": 0, "review": 10}, ["Nothing was rejected.", "to review"]),
        ({"keep": 9, "reject": 1, "review": 0}, ["1 of 10 images (10 %) was rejected"]),
    ],
)
def test_small_and_one_sided_sets(tmp_path, counts, said):
    text = written(tmp_path, **counts).text
    assert all(sentence in text for sentence in said)


def test_a_manifest_made_by_hand_need_not_say_how_it_came_about(tmp_path):
    manifest, evidence = make(tmp_path)
    bare = Manifest(manifest.table, {"root": str(tmp_path)})
    text = Page(write_report(bare, evidence, tmp_path / "report.html")).text
    assert "seed not stated" in text
    off = Manifest(manifest.table, {"root": str(tmp_path), "stop_reason": "off"})
    text = Page(write_report(off, evidence, tmp_path / "report.html")).text
    assert "Refinement : it was off; the images were scored once." in text


def test_ten_thousand_rows_stay_small_and_quick(tmp_path):
    counts = {"keep": 7000, "reject": 1500, "review": 1500}
    manifest, evidence = make(tmp_path, **counts, files=False, groups=[0] * 1400 + [1] * 60 + [2] * 40 + [-1] * 1500)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (300, 300, 3), dtype=np.uint8)  # compresses worst
    for name in [*manifest.table.image_path[manifest.table.decision != "keep"], "good/00000.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not (tmp_path / "noise.png").exists():
            Image.fromarray(noise).save(tmp_path / "noise.png")
        (tmp_path / name).symlink_to(tmp_path / "noise.png")
    begin = time.perf_counter()
    path = write_report(manifest, evidence, tmp_path / "report.html")
    assert time.perf_counter() - begin < 60
    assert path.stat().st_size < 15e6
    page = Page(path)
    assert len(page.all("div", "data-path")) == 500
    assert page.all("li", "class").count("card tile") == 400
    assert "2,576 more, by name" in page.text
    assert "Only the worst 500 images are shown; 2,500 more stand in the manifest." in page.text
    ranked = manifest.table.sort_values("score", ascending=False, kind="stable")
    assert page.all("div", "data-path")[-1] == ranked.image_path.iloc[499]


def test_of_thousands_of_findings_the_worst_are_listed(tmp_path):
    findings = {f"good/{i:05d}.png": "blurred" for i in range(600)}
    page = written(tmp_path, keep=600, files=False, quality=findings)
    assert page.text.count("blurred keep") == 500
    assert "600 images with findings" in page.text
    assert "Only the worst 500 images are shown; 100 more stand in the manifest." in page.text


def test_thumbnails_shrink_until_the_budget_holds(tmp_path, monkeypatch):
    manifest, evidence = make(tmp_path / "images", reject=1, review=0)
    noise = np.random.default_rng(0).integers(0, 255, (400, 400), dtype=np.uint8)
    for name in ("bad/00000.png", "good/00000.png"):
        Image.fromarray(noise).save(tmp_path / "images" / name)
    large = sum(map(len, Page(write_report(manifest, evidence, tmp_path / "large.html")).all("img", "src")))
    monkeypatch.setattr(report, "_PICTURE_BUDGET", large // 3)
    small = sum(map(len, Page(write_report(manifest, evidence, tmp_path / "small.html")).all("img", "src")))
    assert small <= large // 3


def test_a_very_wide_image_stays_legible_and_gets_a_wide_card(tmp_path):
    manifest, evidence = make(tmp_path, reject=1, review=0)
    Image.new("L", (5000, 250), 90).save(tmp_path / "bad/00000.png")
    assert thumbnail(tmp_path / "bad/00000.png").size == (768, 38)
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert any("wide" in classes for classes in page.all("li", "class"))


def test_a_long_tail_is_clipped_and_said_so():
    scores = np.array([*np.linspace(-2, 2, 195), 6, 7, 8, 900, 1000.0])
    table = pd.DataFrame({"score": scores, "decision": ["keep"] * 195 + ["reject"] * 5})
    drawn = charts.histogram(table)
    left, right, *_ = charts._PLOT
    assert drawn["beyond"] == 2
    assert drawn["highest"] == 1000
    assert all(left <= bar["x"] <= right for bar in drawn["bars"])
    assert sum(bar["kind"] == "reject" for bar in drawn["bars"]) >= 2
    assert charts.histogram(table.assign(score=np.nan)) is None
    assert charts.histogram(table.assign(score=0.0))["bars"]


def colours(scheme: str) -> dict[str, str]:
    style = (Path(report.__file__).parent / "report_style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    found = dict(re.findall(r"--([\w-]+): (#\w{6})", light))
    return found if scheme == "light" else found | dict(re.findall(r"--([\w-]+): (#\w{6})", dark))


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2.1."""

    def luminance(colour):
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    darker, lighter = sorted([luminance(first), luminance(second)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag_aa(scheme):
    colour = colours(scheme)
    text = [("ink", "page"), ("ink", "surface"), ("muted", "page"), ("muted", "surface"), ("link", "page")]
    text += [("link", "surface"), ("on-strong", "strong"), ("link", "review-tint")]
    text += [(f"{name}-ink", f"{name}-tint") for name in ("keep", "review", "reject")]
    shapes = [("keep", "surface"), ("reject", "surface"), ("edge", "surface"), ("focus", "page")]
    # Review bars are hatched: the pair of hatch and ground is what tells them from the surface.
    shapes += [("review", "review-mark")]
    low = {pair: contrast(colour[pair[0]], colour[pair[1]]) for pair in text}
    assert min(low.values()) >= 4.5, low
    low = {pair: contrast(colour[pair[0]], colour[pair[1]]) for pair in shapes}
    assert min(low.values()) >= 3, low


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A report with everything in it: odd names, missing and wide images, images listed by name only, findings."""
    root = tmp_path_factory.mktemp("images")
    names = [*ODD_NAMES, "line\nbreak.png", "very/" + "long" * 40 + ".png"]
    quality = {"good/00001.png": "blurred", names[0]: "near duplicate of " + names[1]}
    manifest, evidence = make(root, keep=20, reject=130, review=70, names=names, groups=[0, 1] * 100, quality=quality)
    evidence = unusual_in(evidence, *(f"good/{i:05d}.png" for i in range(15)))
    (root / "bad/00000.png").unlink()
    Image.new("L", (5000, 250), 90).save(root / "bad/00001.png")
    Image.new("L", (200, 900), 90).save(root / "bad/00002.png")
    return write_report(manifest, evidence, root / "report.html")


@pytest.fixture
def page(browser, file):
    """The report opened at 1280 pixels; fails on any console message, error or request but the file's own."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    complaints, requests = [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    opened.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith(("data:", "blob:"))} == {file.as_uri()}


def test_every_picture_decodes_in_the_browser(page):
    sizes = page.eval_on_selector_all("img", "all => all.map(i => i.complete && i.naturalWidth)")
    assert len(sizes) > 3 * 24 + 2 * 176
    assert all(sizes)


def test_hundreds_of_rejected_images_are_a_few_screens(page):
    assert page.evaluate("document.querySelectorAll('.tile').length") == 200 - 24
    assert page.evaluate("document.querySelector('#others').getBoundingClientRect().height") < 8000


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_over_the_side(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    expected = tuple(int(colours(scheme)["page"][i : i + 2], 16) for i in (1, 3, 5))
    assert background == f"rgb{expected}"


FIRST = "document.querySelector('.card h4').textContent"


def test_the_keyboard_reaches_everything(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    first = page.evaluate(FIRST)
    assert page.evaluate("document.activeElement.closest('.choice').dataset.path") == first
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text("#decided") == "1 image decided"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text("#compare h2") == first
    assert page.evaluate("document.activeElement.textContent") == first
    assert page.get_attribute("dialog [data-choice=reject]", "aria-pressed") == "true"
    page.keyboard.press("K")  # decides and goes on, with caps lock too
    assert page.inner_text("#place") == "2 of 212"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("R")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#place") == "3 of 212"
    assert page.evaluate("[...document.querySelectorAll('dialog img')].every(i => i.naturalWidth > 0)")
    page.keyboard.press("Escape")
    assert not page.is_visible("#compare")
    assert page.evaluate("document.activeElement.closest('.card') === document.querySelectorAll('.card')[2]")
    assert page.inner_text("#decided") == "2 images decided"


def test_ends_at_the_last_image(page):
    page.locator(".card .enlarge").last.click()
    assert page.inner_text("#place") == "212 of 212"
    page.keyboard.press("k")
    assert page.inner_text("#place") == "That was the last image."
    assert page.is_disabled("dialog [data-step='1']")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#compare h2") == page.locator(".card h4").last.text_content()


def test_a_whole_kind_and_an_image_in_two_places_are_decided_once(page):
    page.locator("[data-all=reject]").first.click()
    size = page.evaluate("document.querySelector('.group').querySelectorAll('.card').length")
    assert page.inner_text("#decided") == f"{size} images decided"
    twice = "good/00001.png"
    page.evaluate(f"document.querySelector('.choice[data-path=\"{twice}\"] [data-choice=keep]').click()")
    assert page.inner_text("#decided") == f"{size + 1} images decided"
    decided = "all => all.map(choice => choice.closest('.card').dataset.decision)"
    marks = page.eval_on_selector_all(f'.choice[data-path="{twice}"]', decided)
    assert set(marks) == {"keep"}


def test_answers_survive_a_reload_and_come_down_in_the_one_format(page, tmp_path):
    assert page.is_disabled("#download")
    wanted = dict.fromkeys([*ODD_NAMES, "line\nbreak.png"], "keep") | {"near/00000.png": "reject"}
    for name, decision in wanted.items():
        page.evaluate(
            "([name, value]) => [...document.querySelectorAll('.choice')].find(f => f.dataset.path === name)"
            ".querySelector(`[data-choice=${value}]`).click()",
            [name, decision],
        )
    page.reload()
    assert page.inner_text("#decided") == f"{len(wanted)} images decided"
    with page.expect_download() as download:
        page.click("#download")
    assert re.fullmatch(r"answers-\d{8}T\d{4}\.csv", download.value.suggested_filename)
    download.value.save_as(tmp_path / "answers.csv")
    table = pd.read_csv(tmp_path / "answers.csv", dtype=str)
    assert list(table.columns) == ["image_path", "sha256", "decision", "when", "by"]
    assert dict(zip(table.image_path, table.decision, strict=True)) == wanted
    assert table.set_index("image_path").sha256[ODD_NAMES[0]] == hashlib.sha256(ODD_NAMES[0].encode()).hexdigest()
    assert len(read(tmp_path / "answers.csv")) == len(wanted)


def test_prints_to_pdf_without_controls(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator(".choice").first.is_visible()
    assert not page.is_visible("#download")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"  # dark wastes toner
    page.emulate_media(media=None)
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") > 5


def test_can_be_read_without_scripts(browser, file):
    opened = browser.new_page(java_script_enabled=False)
    opened.goto(file.as_uri())
    assert opened.locator(".card img").first.is_visible()
    assert not opened.locator(".choice").first.is_visible()
    assert opened.get_by_text("Scripts are off in this browser").is_visible()
    opened.close()


def test_opens_ten_thousand_rows_in_seconds(browser, tmp_path):
    path = write_report(*make(tmp_path, keep=10, reject=0, review=9990, files=False), tmp_path / "report.html")
    opened = browser.new_page()
    begin = time.perf_counter()
    opened.goto(path.as_uri())
    opened.locator("[data-choice=keep]").first.click()
    assert opened.inner_text("#decided") == "1 image decided"
    assert time.perf_counter() - begin < 20
    opened.close()
