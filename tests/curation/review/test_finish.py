"""The end of a review."""

import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.curation.curate import Curation
from anomalib_metarefine.curation.decisions import append
from anomalib_metarefine.curation.manifest import Manifest, file_sha256
from anomalib_metarefine.curation.review.finish import anomalib_command, finish, next_commands
from anomalib_metarefine.curation.review.session import Session
from anomalib_metarefine.images.answers import Answer
from tests.curation.made_up import make


@pytest.fixture
def folder(tmp_path):
    manifest, evidence = make(tmp_path / "images")
    manifest.table["sha256"] = [file_sha256(manifest.root / name) for name in manifest.table.image_path]
    Curation(manifest, evidence).write(tmp_path / "line-curation")
    return tmp_path / "line-curation"


def answer(folder, name, decision):
    table = Manifest.read(folder).table.set_index("image_path")
    append(folder, [Answer(name, table.sha256[name], decision)])


def decision(folder, name):
    row = Manifest.read(folder).table.set_index("image_path").loc[name]
    return row.decision, row.decided_by


def test_manifest_and_report_say_what_was_answered(folder):
    answer(folder, "good/00001.png", "reject")
    answer(folder, "bad/00000.png", "keep")
    append(folder, [Answer("gone.png", "a1" * 32, "reject")])  # of an image that is no longer in the folder
    assert finish(folder).counts == {"keep": 6, "reject": 4, "review": 3}
    assert decision(folder, "good/00001.png") == ("reject", "user")
    assert decision(folder, "bad/00000.png") == ("keep", "user")
    assert "A person said reject" in (folder / "report.html").read_text(encoding="utf-8")


def test_says_how_many_are_left_at_most(folder):
    session = Session(folder, seed=0)
    for page in (session.next_page("me"), session.next_page("me")):
        session.answer({i: "reject" if "bad" in session.images[i].path else "keep" for i in page.images})
    assert session.standing().looked == 13
    assert "Among the others at most 0 are dirty (95 %)." in finish(folder).verdict
    session.answer({3: ""})
    finish(folder)
    assert "Among the others at most 1 are dirty (95 %)." in (folder / "report.html").read_text().replace("\u00a0", " ")


def test_an_answer_taken_back_leaves_the_image_for_review(folder):
    answer(folder, "good/00001.png", "reject")
    finish(folder)
    answer(folder, "good/00001.png", "review")
    finish(folder)
    assert decision(folder, "good/00001.png") == ("review", "rule")


def test_nothing_is_written_where_nothing_is_new(folder):
    answer(folder, "good/00001.png", "reject")
    finish(folder)
    before = (folder / "report.html").stat().st_mtime_ns
    finish(folder)
    assert (folder / "report.html").stat().st_mtime_ns == before


def test_apply_takes_answers_over_and_says_how_to_train(folder, tmp_path, capsys):
    answer(folder, "good/00001.png", "reject")
    train, apply = next_commands(folder)
    target = tmp_path / "line-clean"
    assert train == f"metarefine train --curation {folder.resolve()} --out {tmp_path / 'line-model'}"
    assert main(apply.split()[1:]) == 0
    assert (target / "reject" / "good" / "00001.png").exists()
    assert anomalib_command({"reject": 5}, target) in capsys.readouterr().out
    assert f"--to {tmp_path / 'line-clean-2'}" in next_commands(folder)[1]


def test_the_training_command_is_one_that_anomalib_understands(folder, tmp_path):
    from anomalib.cli import AnomalibCLI

    for counts, tested in (({"reject": 5}, "from_dir"), ({"reject": 0}, "synthetic")):
        words = anomalib_command(counts, tmp_path / "line-clean").split()
        parsed = AnomalibCLI(args=words[1:], run=False).config["train"]
        assert parsed.data.init_args.normal_dir == "keep"
        assert parsed.data.init_args.test_split_mode == tested
