import re

import pandas as pd
import pytest

from anomalib_metarefine.benchmark.report.folder import report
from tests.benchmark.report.made_up import DATA, MODELS, failed, results

ROWS = results(models=(*MODELS[:3], "EfficientAd"), data=DATA[:3], shares=(0.0, 0.4), seeds=(0, 1))
ROWS = failed(ROWS, "URLError: no | network", model="EfficientAd")
ROWS = failed(ROWS, "Too few defective images.", data="made-up-parts", contamination=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    written = report(ROWS, folder / "out")
    assert sorted(written) == sorted(path for path in folder.rglob("*") if path.is_file())
    assert written[0] == folder / "out/README.md"
    return folder / "out"


def links(text):
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_index_leads_to_everything(folder):
    found = set(links((folder / "README.md").read_text()))
    assert found == {path.name for path in folder.iterdir()} - {"README.md"}
    assert found == {f"{stem}.md" for stem in ("image_auroc", "curation", "pixel", "image_other", "cost")}


def test_the_index_says_what_was_run(folder):
    text = re.sub(" +", " ", (folder / "README.md").read_text())
    assert "| made-up-parts/bolt | 256x256 | 200 | 100 / 80 | 0 %, 40 % | 0, 1 |" in text
    assert '| DFM | `{"class_path": "made_up.DFM"}` | a_backbone | raw, curated, clean | 24 | 12 |' in text
    assert "| EfficientAd |" in text
    assert "- Versions: made up 1.0\n- Machines: no machine\n" in text
    assert "2031-01-01T00:00:00+00:00 to 2031-01-02T00:00:00+00:00" in text


def test_the_index_says_what_could_not_be_run(folder):
    text = (folder / "README.md").read_text().split("## Could not be run")[1]
    # A cell has one reason: the later of the two for EfficientAd on made-up-parts.
    assert text.strip().splitlines() == [
        "- all models on made-up-parts/bolt, made-up-parts/nut at 40 % (48 cells): Too few defective images.",
        "- EfficientAd on made-up-cells, made-up-parts/bolt, made-up-parts/nut at 0 %, 40 % (24 cells): URLError: no "
        "| network",
    ]


def test_tables_in_markdown_are_sound(folder):
    for path in [*folder.glob("*.md")]:
        for block in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_same_rows_make_the_same_files(folder, tmp_path):
    written = report(ROWS.sample(frac=1, random_state=0), tmp_path)
    for path in written:
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_kinds_of_dirt_are_never_mixed(tmp_path):
    rows = results(models=("DFM", "PaDiM"), data=DATA[:1], shares=(0.0, 0.2), seeds=(0,))
    added = rows[rows.contamination > 0].assign(protocol="add", image_AUROC=0.123)
    written = report(pd.concat([rows, added]), tmp_path)
    assert {path.parent.name for path in written[1:]} == {"replace-no-overlap", "add-no-overlap"}
    assert "12.3" in (tmp_path / "add-no-overlap/image_auroc.md").read_text()
    assert "12.3" not in (tmp_path / "replace-no-overlap/image_auroc.md").read_text()
    text = (tmp_path / "README.md").read_text()
    assert "## Results: dirty images are added to the good ones" in text
    assert "## Results: dirty images take the place of good ones" in text
    assert all((tmp_path / link).is_file() for link in links(text))


def test_a_report_of_nothing_but_failures(tmp_path):
    report(failed(ROWS, "no network", backbone="a_backbone"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "(144 cells): no network" in text
    assert "- Versions: not stated" in text
    assert "[1] no network" in (tmp_path / "image_auroc.md").read_text()


def test_a_clean_benchmark_with_one_seed(tmp_path):
    rows = results(models=("PaDiM",), data=DATA[:1], shares=(0.0,), seeds=(0,))
    report(rows[rows.training == "raw"], tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Every cell in the results ran." in text


def test_mixed_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="more than one settings"):
        report(pd.concat([ROWS, ROWS.assign(settings="depth=2")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
