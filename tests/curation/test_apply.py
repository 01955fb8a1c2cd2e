import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_metarefine.curation import apply as module
from anomalib_metarefine.curation.apply import apply
from anomalib_metarefine.curation.evidence import Evidence
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
    assert applied == ({"keep": 2, "reject": 2, "review": 2}, [], 0)
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
    counts = {"keep": 2, "reject": 2, "review": 2}
    assert apply(manifest, tmp_path / "copies", "copy") == (counts, ["dangling.png"], 0)


def test_a_list_can_t_hold_line_breaks(root, tmp_path):
    (root / "line\nbreak.png").write_bytes(b"")
    manifest = make_manifest(root, {"line\nbreak.png": "keep"})
    with pytest.raises(ValueError, match="1 file names have line breaks"):
        apply(manifest, tmp_path / "to", "list")
    assert not (tmp_path / "to").exists()
    assert apply(manifest, tmp_path / "to").counts["keep"] == 1


@pytest.mark.parametrize("mode", ["symlink", "copy"])
def test_names_as_long_as_names_can_be(root, tmp_path, mode):
    name = "ü" * 120 + "0123456789" + ".png"  # 254 bytes of 255
    (root / name).write_bytes(b"long")
    manifest = make_manifest(root, {name: "keep"})
    apply(manifest, tmp_path / "to", mode)
    assert (tmp_path / "to" / "keep" / name).read_bytes() == b"long"


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


SPOILT = ("left/0.png", "left/1.png")
OF_PARTS = dict(zip(DECISIONS, ("keep", "keep", "keep", "review", "review", "reject"), strict=True))


class TestRepair:
    """Six parts: two kept ones with a dark spot, a kept one without, two for review, a rejected one with a spot."""

    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "data"
        for number, name in enumerate(OF_PARTS):
            pixels = np.random.default_rng(number).normal(100 + number, 2, (40, 40)).astype(np.uint8)
            pixels[10:20, 10:20] = 5 if name in SPOILT or number == 5 else pixels[10:20, 10:20]
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name)
        return root

    @pytest.fixture
    def manifest(self, root):
        return make_manifest(root, OF_PARTS)

    @pytest.fixture
    def evidence(self):
        unusual = np.zeros((2, 8, 8), dtype=bool)
        unusual[:, 1:5, 1:5] = True
        return Evidence([], np.empty((0, 8, 8), np.float16), [], [], (0.0, 1.0), list(SPOILT), unusual)

    def test_spots_are_gone_and_all_else_is_copied(self, manifest, evidence, root, tmp_path):
        before = contents(root)
        applied = apply(manifest, tmp_path / "to", "repair", evidence=evidence)
        assert applied == ({"keep": 3, "reject": 1, "review": 2}, [], 2)
        assert contents(root) == before
        assert names(tmp_path / "to") == sorted([*(f"{d}/{n}" for n, d in OF_PARTS.items()), "repairs.csv"])
        for name, decision in OF_PARTS.items():
            copy = tmp_path / "to" / decision / name
            if name in SPOILT:
                assert np.asarray(Image.open(copy))[10:20, 10:20].min() > 80
            else:
                assert copy.read_bytes() == (root / name).read_bytes()
        repairs = pd.read_csv(tmp_path / "to" / "repairs.csv")
        assert repairs.image_path.tolist() == list(SPOILT)
        assert repairs[["left", "top", "width", "height"]].to_numpy().tolist() == [[5, 5, 20, 20]] * 2
        clean = [name for name, decision in OF_PARTS.items() if decision != "reject" and name not in SPOILT]
        assert set(repairs.donor) <= set(clean)

    def test_rejected_images_are_neither_repaired_nor_donors(self, root, evidence, tmp_path):
        decisions = {**OF_PARTS, "left/1.png": "reject"}
        applied = apply(make_manifest(root, decisions), tmp_path / "to", "repair", "reject", evidence=evidence)
        assert applied == ({"keep": 2, "reject": 4}, [], 1)
        repairs = pd.read_csv(tmp_path / "to" / "repairs.csv")
        assert repairs[["image_path", "donor"]].to_numpy().tolist() == [["left/0.png", "left/2.png"]]
        assert (tmp_path / "to/reject/left/1.png").read_bytes() == (root / "left/1.png").read_bytes()

    def test_goes_on_after_an_interruption(self, manifest, evidence, tmp_path, monkeypatch):
        def stop(*_arguments):
            raise KeyboardInterrupt

        whole = apply(manifest, tmp_path / "whole", "repair", evidence=evidence)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_place", stop)
            with pytest.raises(KeyboardInterrupt):
                apply(manifest, tmp_path / "to", "repair", evidence=evidence)
        assert apply(manifest, tmp_path / "to", "repair", evidence=evidence) == whole
        files = {name: content for name, (content, _) in contents(tmp_path / "to").items()}
        assert files == {name: content for name, (content, _) in contents(tmp_path / "whole").items()}

    def test_nothing_unusual_is_a_plain_copy(self, manifest, tmp_path):
        evidence = Evidence([], np.empty((0, 8, 8), np.float16), [], [], (0.0, 1.0))
        assert apply(manifest, tmp_path / "to", "repair", evidence=evidence).repaired == 0
        assert pd.read_csv(tmp_path / "to" / "repairs.csv").empty

    def test_what_can_t_be_repaired_or_read_is_copied_or_left_out(self, root, evidence, tmp_path):
        evidence.unusual[:] = True  # everywhere: there is nothing to take
        (root / "dangling.png").symlink_to("nowhere")
        manifest = make_manifest(root, {**OF_PARTS, "dangling.png": "keep"})
        applied = apply(manifest, tmp_path / "to", "repair", evidence=evidence)
        assert (applied.left_out, applied.repaired) == (["dangling.png"], 0)
        for name in SPOILT:
            assert (tmp_path / "to" / "keep" / name).read_bytes() == (root / name).read_bytes()

    def test_needs_evidence(self, manifest, tmp_path):
        with pytest.raises(ValueError, match="Pass the evidence of the same curation"):
            apply(manifest, tmp_path / "to", "repair")

    def test_a_datamodule_of_the_repaired_images(self, manifest, evidence, tmp_path):
        apply(manifest, tmp_path / "to", "repair", evidence=evidence)
        apply(manifest, tmp_path / "together", "repair", "keep", evidence=evidence)
        for folder, review in (("to", "review"), ("together", "keep")):
            datamodule = manifest.datamodule(repaired=tmp_path / folder, num_workers=0)
            datamodule.setup()
            paths = sorted(datamodule.train_data.samples.image_path.astype(str))
            where = {"keep": "keep", "review": review}
            wanted = [tmp_path / folder / where[d] / n for n, d in OF_PARTS.items() if d != "reject"]
            assert paths == sorted(map(str, wanted))
        with pytest.raises(FileNotFoundError, match=r"5 of 5 images are not in .*left/0.png"):
            manifest.datamodule(repaired=tmp_path)
