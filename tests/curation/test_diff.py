import pytest

from anomalib_metarefine.curation.diff import diff
from tests.curation.test_manifest import DECISIONS, make_files, make_manifest


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path / "data")


@pytest.fixture
def manifest(files):
    return make_manifest(files, DECISIONS)


def test_of_the_same_is_empty(manifest):
    assert diff(manifest, manifest).empty


def test_recognises_moved_and_edited_files(manifest, files):
    (files / "left/0.png").rename(files / "right/0.png")  # moved, and decided otherwise
    (files / "left/1.png").rename(files / "right/1.png")  # only moved
    (files / "left/2.png").write_bytes(b"edited")  # the path remains, decided otherwise
    (files / "right/5.png").unlink()
    (files / "new.png").write_bytes(b"new")
    later = make_manifest(
        files,
        {
            "right/0.png": "reject",
            "right/1.png": "keep",
            "left/2.png": "keep",
            "right/3.png": "reject",
            "right/4.png": "review",
            "new.png": "keep",
        },
    )
    found = diff(manifest, later).drop(columns="reason").to_numpy().tolist()
    assert found == [
        ["decision", "left/2.png", "left/2.png", "review", "keep"],
        ["added", "new.png", "", "", "keep"],
        ["decision", "right/0.png", "left/0.png", "keep", "reject"],
        ["removed", "right/5.png", "right/5.png", "reject", ""],
    ]


def test_exact_copies_and_unreadable_files_are_not_mixed_up(files):
    for name in ("0", "1"):
        (files / "left" / f"{name}.png").write_bytes(b"twin")
    before = make_manifest(files, DECISIONS, sha256=["twin", "twin", "", "", "4", "5"])
    renamed = {name.replace("left", "moved"): decision for name, decision in DECISIONS.items()}
    after = make_manifest(files, renamed, sha256=["twin", "twin", "", "", "4", "5"])
    changes = diff(before, after)
    # Twins pair off; a file that could not be read is known by its path only.
    assert list(zip(changes.change, changes.image_path, strict=True)) == [
        ("removed", "left/2.png"),
        ("added", "moved/2.png"),
    ]


def test_of_copies_the_first_stands_for_the_first(files):
    before = make_manifest(files, DECISIONS, sha256=["twin", "twin", "b", "c", "d", "e"])
    renamed = {name.replace("left", "moved"): decision for name, decision in DECISIONS.items()}
    after = make_manifest(files, renamed | {"moved/1.png": "reject"}, sha256=["twin", "twin", "b", "c", "d", "e"])
    found = diff(before, after)
    assert found.image_path_before.tolist() == ["left/1.png"]
    assert found.image_path.tolist() == ["moved/1.png"]
