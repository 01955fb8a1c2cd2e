import shutil

import pytest

from anomalib_metarefine.curation import apply as module
from anomalib_metarefine.curation.apply import apply
from tests.curation.test_manifest import DECISIONS, make_files, make_manifest


@pytest.fixture
def root(tmp_path):
    return make_files(tmp_path / "data")


@pytest.fixture
def manifest(root):
    return make_manifest(root, DECISIONS)


def contents(folder):
    """Every file with its bytes, and the time it was changed."""
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


SORTED = sorted(f"{decision}/{name}" for name, decision in DECISIONS.items())


@pytest.mark.parametrize("mode", ["symlink", "copy"])
def test_sorts_into_folders_and_leaves_the_originals_alone(manifest, root, tmp_path, mode):
    before = contents(root)
    applied = apply(manifest, tmp_path / "to" / "deep", mode)
    assert applied == ({"keep": 2, "reject": 2, "review": 2}, [])
    assert names(tmp_path / "to" / "deep") == SORTED
    for name, decision in DECISIONS.items():
        target = tmp_path / "to" / "deep" / decision / name
        assert target.read_bytes() == (root / name).read_bytes()
        assert target.is_symlink() == (mode == "symlink")
    assert contents(root) == before


def test_links_are_absolute(manifest, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    apply(manifest, "to")
    assert (tmp_path / "to/keep/left/0.png").readlink() == root / "left/0.png"


def test_lists(manifest, root, tmp_path):
    apply(manifest, tmp_path / "to", "list")
    assert names(tmp_path / "to") == ["keep.txt", "reject.txt", "review.txt"]
    assert (tmp_path / "to/keep.txt").read_text().splitlines() == [str(root / "left/0.png"), str(root / "left/1.png")]


@pytest.mark.parametrize("review", ["keep", "reject"])
def test_review_goes_with_the_others(manifest, tmp_path, review):
    applied = apply(manifest, tmp_path / "to", review=review)
    assert applied.counts == {"keep": 2, "reject": 2, review: 4}
    assert (tmp_path / "to" / review / "left" / "2.png").is_symlink()
    assert not (tmp_path / "to" / "review").exists()
    assert apply(manifest, tmp_path / "lists", "list", review).counts == applied.counts
    assert names(tmp_path / "lists") == ["keep.txt", "reject.txt"]


def test_refuses_a_folder_where_it_could_do_harm(manifest, root, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(root)
    for to, message in [
        (tmp_path / "full", "is not empty. Expected"),
        (tmp_path / "full" / "mine.txt", "is a file. Expected a folder"),
        (root / "curated", "lies inside the folder of the images"),
        (tmp_path / "link" / "curated", "lies inside the folder of the images"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply(manifest, to)
    inner = make_manifest(tmp_path / "only" / "data", {"a.png": "reject"}, sha256="")
    with pytest.raises(ValueError, match="contains the folder of the images"):
        apply(inner, tmp_path / "only")
    assert names(tmp_path / "full") == ["mine.txt"]
    assert names(root) == sorted(DECISIONS)


def test_images_from_all_over_the_file_system(root, tmp_path):
    """Everything lies inside their common folder then, and there must be somewhere to go."""
    everywhere = {str(root / name).lstrip("/"): decision for name, decision in DECISIONS.items()}
    manifest = make_manifest(type(root)("/"), everywhere)
    assert apply(manifest, tmp_path / "to").counts["keep"] == 2


def test_refuses_what_is_not_what_was_decided_on(manifest, root, tmp_path):
    (root / "left/0.png").write_bytes(b"edited")
    with pytest.raises(ValueError, match=r"1 changed \(left/0.png\)"):
        apply(manifest, tmp_path / "to")
    with pytest.raises(ValueError, match="found 'move' and 'separate'"):
        apply(manifest, tmp_path / "to", "move")
    assert not (tmp_path / "to").exists()


def test_unreadable_files_are_linked_but_not_copied(root, tmp_path):
    (root / "dangling.png").symlink_to("nowhere")
    manifest = make_manifest(root, {**DECISIONS, "dangling.png": "reject"})
    assert manifest.verify().changed == []
    manifest.table.loc[manifest.table.image_path == "dangling.png", "decided_by"] = "unreadable"
    assert apply(manifest, tmp_path / "links").counts["reject"] == 3
    assert apply(manifest, tmp_path / "copies", "copy") == ({"keep": 2, "reject": 2, "review": 2}, ["dangling.png"])


def test_a_list_can_t_hold_line_breaks(root, tmp_path):
    (root / "line\nbreak.png").write_bytes(b"")
    manifest = make_manifest(root, {"line\nbreak.png": "keep"})
    with pytest.raises(ValueError, match="1 file names have line breaks"):
        apply(manifest, tmp_path / "to", "list")
    assert not (tmp_path / "to").exists()
    assert apply(manifest, tmp_path / "to").counts["keep"] == 1


class TestInterrupted:
    @pytest.fixture
    def half(self, manifest, tmp_path, monkeypatch):
        """A copy that broke off in the middle of the fourth file."""
        calls = []

        def copy(source, target):
            calls.append(source)
            if len(calls) == 4:
                target.write_bytes(b"ha")
                raise KeyboardInterrupt
            return shutil_copy2(source, target)

        shutil_copy2 = shutil.copy2
        with monkeypatch.context() as patch:
            patch.setattr(module.shutil, "copy2", copy)
            with pytest.raises(KeyboardInterrupt):
                apply(manifest, tmp_path / "to", "copy")
        return tmp_path / "to"

    def test_has_no_half_files_under_their_names(self, half, root):
        done = [path for path in half.rglob("*.png") if not path.name.startswith(".")]
        assert len(done) == 3
        assert all(path.read_bytes() == "/".join(path.parts[-2:]).encode() for path in done)

    def test_goes_on(self, half, manifest):
        first = half / "keep" / "left" / "0.png"
        inode = first.stat().st_ino
        assert apply(manifest, half, "copy").counts == {"keep": 2, "reject": 2, "review": 2}
        assert names(half) == SORTED
        assert first.stat().st_ino == inode
        with pytest.raises(ValueError, match="is not empty"):
            apply(manifest, half, "copy")

    def test_but_not_with_anything_else(self, half, manifest, root):
        with pytest.raises(ValueError, match="unfinished work of another manifest, mode or review"):
            apply(manifest, half, "symlink")
        with pytest.raises(ValueError, match="unfinished work of another manifest"):
            apply(manifest, half, "copy", review="keep")
        other = make_manifest(root, {**DECISIONS, "left/0.png": "reject"})
        with pytest.raises(ValueError, match="unfinished work of another manifest"):
            apply(other, half, "copy")
