"""The command: with the page, and without what the page needs."""

import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.cli import review as command
from anomalib_metarefine.curation.curate import Curation
from tests.curation.made_up import make


@pytest.fixture
def folder(tmp_path):
    Curation(*make(tmp_path / "images")).write(tmp_path / "out")
    return tmp_path / "out"


def test_without_the_extra_there_is_a_table(folder, monkeypatch, capsys):
    monkeypatch.setattr(command, "_NEEDED", ("starlette", "no_such_package"))
    assert main(["review", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "The review page needs no_such_package: pip install 'anomalib-metarefine[review]'." in said
    assert (folder / "to_review.csv").exists()


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_serves_this_machine_and_warns_of_more(folder, monkeypatch, capsys, host, warned):
    server = pytest.importorskip(
        "anomalib_metarefine.curation.review.serving", reason="The extra `review` is not installed."
    )
    called = []
    monkeypatch.setattr(server, "serve", lambda session, *where: called.append((len(session.images), *where[:2])))
    assert main(["review", str(folder), "--host", host, "--port", "8123", "--no-browser"]) == 0
    said = capsys.readouterr()
    assert called == [(13, host, 8123)]
    assert ("everybody who can reach 0.0.0.0" in said.err) is warned
    assert "Looked at 0 of 13, found 0, at most 13 left (95 %)." in said.out


def test_names_what_is_missing(tmp_path, capsys):
    assert main(["review", str(tmp_path)]) == 2
    assert "metarefine curate" in capsys.readouterr().err
