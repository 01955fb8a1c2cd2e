"""The documentation: its commands run, its links lead somewhere, its generated pages are current."""

import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anomalib.data
import anomalib.models
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

import anomalib_metarefine
from anomalib_metarefine.cli import build_parser, main
from anomalib_metarefine.curation.curate import Curation
from anomalib_metarefine.curation.manifest import file_sha256
from tests.curation.made_up import make

ROOT = Path(__file__).parents[1]
GUIDES = ["start", "curate", "train", "models", "deployment", "threshold", "update"]
GUIDES += ["settings", "quality", "data", "structure"]
PAGES = [ROOT / "README.md", ROOT / "configs/model/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE = re.compile(r"[\w/]+\.md")
QUICK = {"apply", "diff", "report", "convert"}  # the others load a backbone or a model: their arguments are parsed only


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page, program):
    """Lines of the shell blocks of a page that run a program, as lists of words, without variables and comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    words = [line[1:] if line and re.fullmatch(r"\w+=\S*", line[0]) else line for line in words]
    return [line for line in words if line and line[0] == program]


def pages_of(names):
    return [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in names)]


OURS = [(page.stem, words) for page in pages_of(GUIDES) for words in commands(page, "metarefine")]
ANOMALIB = [(page.stem, words) for page in pages_of(GUIDES) for words in commands(page, "anomalib")]


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A folder where the guides' own names are: images, and the curation of them, as a run has left it."""
    folder = tmp_path_factory.mktemp("guides")
    manifest, evidence = make(folder / "line7/good", keep=8, reject=2, review=2)
    manifest.table["sha256"] = [file_sha256(manifest.root / name) for name in manifest.table.image_path]
    Curation(manifest, evidence).write(folder / "line7-curation")
    return folder


@pytest.fixture
def here(curated, tmp_path, monkeypatch):
    for name in ("line7", "line7-curation"):
        shutil.copytree(curated / name, tmp_path / name)
    manifest = tmp_path / "line7-curation/run.json"
    manifest.write_text(manifest.read_text().replace(str(curated), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "words"), OURS, ids=lambda value: value if isinstance(value, str) else value[1])
def test_commands_of_the_guides_can_be_parsed(page, words):
    assert build_parser().parse_args(words[1:]).command == words[1], page


def test_every_page_with_commands_was_found():
    assert {page for page, _ in OURS} >= {"README", "start", "curate", "train", "models", "deployment", "threshold"}
    assert len(OURS) > 20


@pytest.mark.parametrize("words", [words for _, words in OURS if words[1] in QUICK], ids=" ".join)
def test_quick_commands_of_the_guides_run(here, words):
    assert main([*words[1:], "--quiet"]) == 0
    if "--to" in words:
        written = [path for path in Path(words[words.index("--to") + 1]).rglob("*") if path.is_file()]
        assert len(written) >= (2 if "list" in words else 12)


def test_a_table_is_written_filled_in_and_taken_over_as_the_guide_says(here):
    ask, answer = (words for _, words in OURS if words[1] == "review" and "questions.csv" in words)
    assert main(ask[1:]) == 0
    table = pd.read_csv("questions.csv", dtype=str, keep_default_na=False)
    table["decision"] = "reject"
    table.to_csv("questions.csv", index=False)
    assert main(answer[1:]) == 0
    manifest = pd.read_csv("line7-curation/manifest.csv")
    assert (manifest[manifest.decided_by == "user"].decision == "reject").sum() == len(table) > 0


@pytest.mark.parametrize(("page", "words"), ANOMALIB, ids=lambda value: value if isinstance(value, str) else value[3])
def test_options_of_anomalib_are_there(page, words):
    assert words[1] == "train"
    options = dict(zip(words[2::2], words[3::2], strict=True))
    parts = {"model": anomalib.models, "data": anomalib.data}
    anomalib_metarefine.register()
    for option in options:
        part, _, name = option.removeprefix("--").partition(".")
        if name and f"--{part}" in options:
            chosen = getattr(parts[part], options[f"--{part}"])
            assert name in inspect.signature(chosen).parameters, (page, option)


def test_python_of_the_guides_compiles_and_imports_what_is_there():
    found = 0
    for page in pages_of([*GUIDES, "rules", "method"]):
        for block in blocks(page, "python"):
            compile(block, page.name, "exec")
            for line in re.findall(r"^(?:from|import) .*", block, re.MULTILINE):
                exec(line, {})
                found += 1
    assert found > 15


def test_the_rule_of_ones_own_does_what_the_page_says():
    (block,) = blocks(ROOT / "docs/rules.md", "python")
    space = {}
    exec(block, space)
    assert space["images"].sum() == 2
    assert "# 2:" in block


def test_the_reference_is_current():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not current: python docs/make_reference.py"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "studies").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)):
        if target.startswith(("http", "#")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_pages_stay_short():
    """Limits for what is read; what is looked up, as the navigation has it, may be as long as it is."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1].split("- Reference:")[0]
    words = {name: len((ROOT / "docs" / name).read_text(encoding="utf-8").split()) for name in PAGE.findall(navigation)}
    assert len(words) > 15
    assert not {name: count for name, count in words.items() if count > 1500}
    assert sum(words.values()) <= 14_000


def test_lines_fit_a_screen():
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        long = [number for number, line in enumerate(lines, 1) if len(line) > 120]
        assert not long, page


def test_studies_files_that_pages_name_are_there():
    for page in PAGES:
        for name in re.findall(r"`(studies/[\w/]+\.\w+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), (page.name, name)


def test_the_picture_of_the_review_is_small():
    picture = ROOT / "docs/figures/review.png"
    assert picture.stat().st_size < 300 * 1024
    assert np.asarray(Image.open(picture).convert("L")).std() > 20


@pytest.mark.slow
def test_start_from_the_first_line_to_the_last(tmp_path):
    """Everything on the page, in order, but the installation and the page of the review."""
    page = (ROOT / "docs/start.md").read_text(encoding="utf-8")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if "venv" in block or block == "metarefine review line7-curation\n":
            continue
        command = ["python", "-c", block] if language == "python" else ["bash", "-ec", block]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PATH": programs}
        )
        assert done.returncode == 0, block + done.stdout + done.stderr
    assert len((tmp_path / "line7.jsonl").read_text().splitlines()) > 150


def test_the_entry_for_studio_has_the_fields_of_anomalibs_own():
    (entry,) = yaml.safe_load((ROOT / "configs/model/studio.yaml").read_text())
    assert anomalib.models.get_model(entry["id"], pre_trained=False).name == entry["name"]
    fields = ["id", "name", "description", "family", "recommended", "license", "docs_url", "parameters", "supported"]
    assert list(entry) == fields


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    notebook = json.loads((ROOT / "docs/examples/start.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # as Jupyter does it
    assert names["found"].dirty.sum() == 18
    assert set(names["results"]) == {"on everything", "refined"}


@pytest.mark.slow
def test_the_search_answers_a_vision_engineers_questions(tmp_path):
    """Every heading of the page of questions, typed into the search of the built pages, finds its answer first."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no Chromium")
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", site], cwd=ROOT, check=True)
    titles = re.findall(r"^## (.*)", (ROOT / "docs/questions.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(titles) > 9

    class Pages(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server, sync_api.sync_playwright() as running:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        for title in titles:
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.click(".md-search__input")
            page.keyboard.type(title)
            page.wait_for_selector(".md-search-result__item")
            page.wait_for_timeout(1500)  # a search for every letter; the last one counts
            first = page.get_attribute(".md-search-result__item a", "href")
            assert "/questions/" in first, title
        server.shutdown()
