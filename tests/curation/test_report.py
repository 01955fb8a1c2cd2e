"""The report: what is in the file, and how it behaves in a real browser (skipped where there is no Chromium)."""

import dataclasses
import hashlib
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_metarefine.curation import report
from anomalib_metarefine.curation.decisions import read
from anomalib_metarefine.curation.evidence import Evidence
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.report import overlay, thumbnail, write_report

ODD_NAMES = ["<b>bold & \"quoted\" 'name'.png", "größe 部品.png", "50% #1?.png", "a, b.png", "sub/ü/{{ 7 * 7 }}.png"]
FENCE = 4.0


def make(root: Path, keep=6, reject=4, review=3, names=(), files=True, visible_split=True, groups=None, quality=None):
    """A manifest and its evidence over small images under ``root``; ``names`` are the first of the rejected."""
    listed = [f"good/{i:05d}.png" for i in range(keep)]
    listed += [*names, *(f"bad/{i:05d}.png" for i in range(reject - len(names)))]
    listed += [f"near/{i:05d}.png" for i in range(review)]
    rng = np.random.default_rng(0)
    if files:
        for name in listed:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (24, 32), dtype=np.uint8)).save(root / name)
    decision = np.repeat(["keep", "reject", "review"], [keep, reject, review])
    score = np.where(decision == "keep", rng.normal(0, 1, len(listed)).clip(-3, 3), FENCE - 0.3)
    score[decision == "reject"] = FENCE + 1 + np.arange(reject)[::-1]
    table = pd.DataFrame(
        {
            "image_path": listed,
            "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in listed],
            "decision": decision,
            "decided_by": "rule",
            "round": (decision == "reject").astype(int),
            "reason": np.where(decision == "reject", "A patch stands out <far>.", "Close to the others."),
            "score": score,
            "fence_distance": score - FENCE,
            "dirty_probability": 1 / (1 + np.exp(FENCE - score)),
            "uncertainty": 0.4,
            "score_round_1": score * 0.9,
            "quality": "",
        }
    )
    for name, finding in (quality or {}).items():
        table.loc[table.image_path == name, "quality"] = finding
    run = {
        "created": "2026-03-01T09:12:44Z",
        "root": str(root),
        "source": "line <7>",
        "versions": {"anomalib": "2.7.0"},
        "seed": 3,
        "settings": {"rule": "auto"},
        "data": {"images": len(listed), "sha256": "f00d"},
        "contamination": {"estimate": 0.3, "low": 0.2, "high": 0.5, "level": 0.9, "visible_split": visible_split},
        "rounds": [{"number": 1, "fence": FENCE * 0.9, "rejected": reject}],
        "stop_reason": "converged",
        "seconds": {"features": 1.5},
    }
    shown = listed[keep:]
    evidence = Evidence(
        paths=shown,
        maps=rng.random((len(shown), 6, 8)).astype(np.float16),
        nearest=[listed[0] if keep else ""] * len(shown),
        groups=groups or [-1] * len(shown),
        limits=(0.0, 1.0),
    )
    return Manifest(table, run), evidence


def unusual_in(evidence: Evidence, *names: str) -> Evidence:
    """One unusual patch, the same in each of these images."""
    masks = np.zeros((len(names), 6, 8), dtype=bool)
    masks[:, 2, 3] = True
    return dataclasses.replace(evidence, unusual_in=list(names), unusual=masks)


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
    assert "4 of 13 images (30.8 %) were rejected, 3 need your eyes." in page.text
    assert "Best estimate 30 %, about 4 of 13 images; with 90 % probability between 20 % and 50 %." in page.text
    assert "the kept set no longer changed" in page.text
    assert "Round 1: histogram of 13 image scores" in page.text
    assert "The fence is at 3.6; 4 scores are above it." in page.text
    assert "near duplicate of good/00002.png" in page.text
    assert "f00d" in page.text
    assert "The decisions below are guesses" not in page.text


def test_warns_without_a_visible_split(tmp_path):
    assert "The decisions below are guesses." in written(tmp_path, visible_split=False).text
    nothing = written(tmp_path, visible_split=False, reject=0).text
    assert "Nothing stands apart." in nothing
    assert "guesses" not in nothing


def test_is_one_file_and_asks_for_nothing_else(tmp_path):
    page = written(tmp_path)
    sources = page.all("img", "src")
    assert len(sources) == 3 * (4 + 3)
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
    assert set(ODD_NAMES) <= set(page.all("fieldset", "data-path"))
    assert not page.all("b", "bold")
    assert "49" not in [word.strip() for word in page.words if "7 * 7" in word]
    assert page.text.count("A patch stands out <far>.") == 5


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
    assert page.text.count("The file can't be read (UnidentifiedImageError).") == 1
    assert page.text.count("There is no kept image to compare with.") == 1
    assert page.text.count("No image to lay the map on.") == 2
    assert len(page.all("img", "src")) == 3 * 7 - 5


def test_unusual_places_stand_beside_what_repair_makes_of_them(tmp_path):
    manifest, evidence = make(tmp_path)
    evidence = unusual_in(evidence, "good/00001.png", "near/00000.png", "bad/00000.png")
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert "but 2 images have regions that lie further from their like" in page.text  # the third is rejected
    assert "metarefine apply manifest.csv --to DIR --mode repair" in page.text
    alts = [alt for alt in page.all("img", "alt") if alt.endswith(("image", "unusual", "repaired"))]
    names = ("good/00001.png", "near/00000.png")
    assert alts == [f"{name}: {what}" for name in names for what in ("image", "unusual", "repaired")]
    assert "#unusual" in page.all("a", "href")
    (tmp_path / "good/00003.png").unlink()
    gone = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert "Not all images are where they were, so there are no pictures." in gone.text
    assert "Unusual places" not in written(tmp_path).text


def test_a_persons_decision_is_told_from_the_rules(tmp_path):
    manifest, evidence = make(tmp_path, reject=2)
    manifest.table.loc[manifest.table.image_path == "bad/00001.png", ["decided_by", "fence_distance"]] = ["user", -0.5]
    text = Page(write_report(manifest, evidence, tmp_path / "report.html")).text
    assert text.count("decided by you") == 1
    assert "bad/00001.png 0.5 SD inside the fence score 5.0 ± 0.4" in text


def test_unreadable_files_have_a_table_of_their_own(tmp_path):
    manifest, evidence = make(tmp_path)
    row = manifest.table.image_path == "bad/00003.png"
    manifest.table.loc[row, ["score", "fence_distance", "dirty_probability", "score_round_1"]] = np.nan
    manifest.table.loc[row, ["decided_by", "reason"]] = ["unreadable", "The file is empty."]
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert "Files that could not be read" in page.text
    assert "bad/00003.png The file is empty." in page.text
    assert "bad/00003.png" not in page.all("fieldset", "data-path")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"keep": 10, "reject": 0, "review": 0}, ["None was rejected.", "No image is near enough to the fence"]),
        ({"keep": 0, "reject": 0, "review": 10}, ["None was rejected.", "There is no kept image to compare with."]),
        ({"keep": 9, "reject": 1, "review": 0}, ["1 of 10 images (10 %) was rejected", "Rejected images 1 image"]),
    ],
)
def test_small_and_one_sided_sets(tmp_path, counts, said):
    text = written(tmp_path, **counts).text
    assert all(sentence in text for sentence in said)


def test_a_manifest_made_by_hand_need_not_say_how_it_came_about(tmp_path):
    manifest, evidence = make(tmp_path)
    bare = Manifest(manifest.table, {"root": str(tmp_path)})
    text = Page(write_report(bare, evidence, tmp_path / "report.html")).text
    assert "It was not estimated." in text
    assert "seed not stated" in text
    off = Manifest(manifest.table, {"root": str(tmp_path), "stop_reason": "off"})
    text = Page(write_report(off, evidence, tmp_path / "report.html")).text
    assert "Refinement: it was off; the images were scored once." in text


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
    assert len(page.all("fieldset", "data-path")) == 120 + 60
    assert len(page.all("select", "data-path")) == 1500 + 1500 - 120 - 60
    assert "120 of 1,500 are shown" in page.text
    assert "1,380 more rejected images, by name" in page.text
    for heading in ["Kind 1 1,400 images, 40 shown", "Kind 2 60 images, 40 shown", "Kind 3 40 images ("]:
        assert heading.removesuffix(" (") in page.text  # no kind crowds out another


def test_thumbnails_shrink_until_the_budget_holds(tmp_path, monkeypatch):
    manifest, evidence = make(tmp_path / "images", reject=1, review=0)
    noise = np.random.default_rng(0).integers(0, 255, (400, 400), dtype=np.uint8)
    for name in ("bad/00000.png", "good/00000.png"):
        Image.fromarray(noise).save(tmp_path / "images" / name)
    large = sum(map(len, Page(write_report(manifest, evidence, tmp_path / "large.html")).all("img", "src")))
    monkeypatch.setattr(report, "_PICTURE_BUDGET", large // 3)
    small = sum(map(len, Page(write_report(manifest, evidence, tmp_path / "small.html")).all("img", "src")))
    assert small <= large // 3


GRADIENT = np.linspace(0, 1, 600 * 400).reshape(400, 600)


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("deep.png", Image.fromarray((4095 * GRADIENT).astype(np.uint16))),
        ("float.tif", Image.fromarray((GRADIENT - 7).astype(np.float32))),
        ("grey.jpg", Image.fromarray((255 * GRADIENT).astype(np.uint8))),
        ("binary.png", Image.fromarray(GRADIENT > 0.5)),
        ("palette.png", Image.fromarray((255 * GRADIENT).astype(np.uint8)).convert("RGB").quantize(64)),
        ("cmyk.jpg", Image.fromarray((255 * GRADIENT).astype(np.uint8)).convert("CMYK")),
        ("alpha.png", Image.fromarray((255 * GRADIENT).astype(np.uint8)).convert("RGBA")),
    ],
)
def test_every_kind_of_image_keeps_its_content(tmp_path, file, image):
    image.save(tmp_path / file)
    small = thumbnail(tmp_path / file)
    assert small.mode in ("L", "RGB")
    assert max(small.size) <= 1.25 * 256
    assert small.width / small.height == pytest.approx(1.5, rel=0.02)
    grey = np.asarray(small.convert("L"), dtype=float)
    assert grey[:20].mean() < 40
    assert grey[-20:].mean() > 215


def test_transparent_pixels_are_grey_not_black(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(thumbnail(tmp_path / "clear.png")).tolist() == np.full((64, 64, 3), 128).tolist()


def test_a_very_wide_image_stays_legible_and_gets_a_wide_card(tmp_path):
    manifest, evidence = make(tmp_path, reject=1, review=0)
    Image.new("L", (5000, 250), 90).save(tmp_path / "bad/00000.png")
    assert thumbnail(tmp_path / "bad/00000.png").size == (768, 38)
    page = Page(write_report(manifest, evidence, tmp_path / "report.html"))
    assert "card wide" in page.all("li", "class")


def test_the_map_lies_on_its_place():
    heat = np.zeros((4, 8))
    heat[0, 7] = 1  # top right
    heat[3, 0] = np.nan
    shown = np.asarray(overlay(Image.new("L", (160, 80), 128), heat, (0.0, 1.0)), dtype=float)
    assert shown.shape == (80, 160, 3)
    colourful = np.ptp(shown, axis=2)
    assert np.unravel_index(colourful.argmax(), colourful.shape)[0] < 20
    assert np.unravel_index(colourful.argmax(), colourful.shape)[1] > 140
    assert (shown[40:, :80] == 128).all()


def test_a_long_tail_is_clipped_and_said_so():
    scores = np.array([*np.linspace(-2, 2, 95), 6, 7, 8, 900, 1000.0])
    decisions = pd.Series(["keep"] * 95 + ["reject"] * 5)
    drawn = report._histogram("Round 1", scores, decisions, 4.0)
    assert re.search(r"2 scores above [\d.]+, to 1,000.0, in the last bar.", " ".join(drawn["notes"]))
    left, right, *_ = report._PLOT
    assert left + 0.2 * (right - left) < drawn["fence"][0] < right - 0.2 * (right - left)
    assert drawn["past"] == 5
    assert all(left <= bar["x"] <= right for bar in drawn["bars"])


def test_a_fence_far_away_and_no_fence_are_said():
    decisions = pd.Series(["keep"] * 20)
    scores = np.linspace(-1, 1, 20)
    assert "outside the picture" in report._histogram("Round 1", scores, decisions, 50.0)["notes"][0]
    assert report._histogram("Round 1", scores, decisions, None)["notes"] == ["No fence: nothing stood out."]
    assert report._histogram("Round 1", np.full(20, np.nan), decisions, None) is None
    assert report._histogram("Round 1", np.zeros(20), decisions, None)["bars"]


@pytest.mark.parametrize(("rejected", "said"), [(2, "Fewer images"), (8, "lies inside"), (20, "More images")])
def test_the_estimate_is_set_against_what_was_rejected(rejected, said):
    share = {"estimate": 0.08, "low": 0.05, "high": 0.12}
    drawn = report._contamination(share, {"keep": 100 - rejected, "reject": rejected, "review": 0})
    assert said in drawn["advice"]
    assert all(0 <= drawn[name] <= 1 for name in ("low", "estimate", "high", "rejected"))


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


CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("There is no Chromium here; on Debian and Ubuntu, install the package chromium.")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright (extra `dev`) is not installed.")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


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


def focused(page) -> str:
    return page.evaluate("(document.activeElement.textContent || document.activeElement.value).trim()")


def test_every_picture_decodes_in_the_browser(page):
    sizes = page.eval_on_selector_all("img", "all => all.map(i => i.complete && i.naturalWidth)")
    assert len(sizes) == 3 * 180 - 2 + 3 * 12
    assert all(sizes)


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


def test_the_keyboard_reaches_everything(page):
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the content"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.card input:checked')")
    first = page.evaluate("document.activeElement.closest('fieldset').dataset.path")
    page.keyboard.press("ArrowLeft")
    assert focused(page) == "reject"
    assert page.inner_text("#decided") == "1 image decided"
    page.keyboard.press("Tab")
    assert focused(page) == f"Enlarge {first}"
    page.keyboard.press("Enter")
    assert page.inner_text("#compare h2") == first
    assert focused(page) == first
    assert page.get_attribute("[data-choice=reject]", "aria-pressed") == "true"
    page.keyboard.press("k")  # decides and goes on
    assert page.inner_text("#place") == "2 of 180"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("r")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#place") == "3 of 180"
    assert page.evaluate("[...document.querySelectorAll('dialog img')].every(i => i.naturalWidth > 0)")
    page.keyboard.press("Escape")
    assert not page.is_visible("#compare")
    third = page.evaluate("document.activeElement.closest('.card').querySelector('fieldset').dataset.path")
    assert third == page.evaluate("document.querySelectorAll('.card fieldset')[2].dataset.path")
    assert page.inner_text("#decided") == "2 images decided"


def test_decisions_come_down_as_the_csv_that_review_reads(page, tmp_path):
    assert page.is_disabled("#download")
    odd = ODD_NAMES[0]
    wanted = dict.fromkeys([*ODD_NAMES, "line\nbreak.png"], "keep") | {"near/00000.png": "reject"}
    for name, decision in wanted.items():
        page.evaluate(
            "([name, value]) => [...document.querySelectorAll('fieldset')].find(f => f.dataset.path === name)"
            ".querySelector(`[value=${value}]`).click()",
            [name, decision],
        )
    # One of those listed by name only.
    page.eval_on_selector_all("details", "all => all.forEach(d => { d.open = true })")
    listed = page.locator("select").last
    listed.select_option("reject")
    wanted[listed.get_attribute("data-path")] = "reject"
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "decisions.csv"
    download.value.save_as(tmp_path / "decisions.csv")
    table = pd.read_csv(tmp_path / "decisions.csv", dtype=str)
    assert list(table.columns) == ["sha256", "image_path", "decision"]
    assert dict(zip(table.image_path, table.decision, strict=True)) == wanted
    assert table.set_index("image_path").sha256[odd] == hashlib.sha256(odd.encode()).hexdigest()
    assert len(read(tmp_path / "decisions.csv")) == len(wanted)


def test_prints_to_pdf_without_controls(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.is_visible("fieldset")
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
    assert not opened.locator("fieldset").first.is_visible()
    assert opened.get_by_text("Scripts are off in this browser").is_visible()
    opened.close()


def test_opens_ten_thousand_rows_in_seconds(browser, tmp_path):
    path = write_report(*make(tmp_path, keep=10, reject=0, review=9990, files=False), tmp_path / "report.html")
    opened = browser.new_page()
    begin = time.perf_counter()
    opened.goto(path.as_uri())
    opened.locator("input[value=keep]").first.check()
    assert opened.inner_text("#decided") == "1 image decided"
    assert time.perf_counter() - begin < 20
    opened.close()
