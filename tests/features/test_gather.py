import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_metarefine.features import extract
from anomalib_metarefine.features import gather as gather_module
from anomalib_metarefine.features.backbone import Backbone
from anomalib_metarefine.features.gather import gather, versions
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.images import quality, reading
from anomalib_metarefine.progress import progress_bars
from tests.conftest import part


@pytest.fixture(scope="module")
def backbone():
    return Backbone(OFFLINE_BACKBONE)


@pytest.fixture
def root(tmp_path):
    """Five parts of 64 x 128 pixels, one of them a copy, one of another shape, and two files that are no images."""
    rng = np.random.default_rng(0)
    (tmp_path / "line7" / "late").mkdir(parents=True)
    for name in ["a.png", "b.png", "late/c.png"]:
        part(rng, (64, 128)).save(tmp_path / "line7" / name)
    part(rng, (128, 64)).save(tmp_path / "line7" / "upright.png")
    (tmp_path / "line7" / "copy.png").write_bytes((tmp_path / "line7" / "a.png").read_bytes())
    (tmp_path / "line7" / "aa.png").write_text("not an image")
    (tmp_path / "line7" / "empty.png").write_bytes(b"")
    return tmp_path / "line7"


def gathered(data, backbone, **settings):
    with progress_bars(enabled=False) as bars:
        found = gather(data, backbone, OFFLINE_BACKBONE, bars, **{"image_size": (64, 96), **settings})
        assert all(task.finished for task in bars.tasks)
    return found


def test_images_that_can_be_read_are_embedded_and_all_are_looked_at(root, backbone):
    found = gathered(root, backbone)
    names = found.source.names
    assert names == sorted(["a.png", "aa.png", "b.png", "copy.png", "empty.png", "late/c.png", "upright.png"])
    assert [fact.path for fact in found.facts] == [str(path) for path in found.source.paths]
    assert [names[i] for i in found.readable] == ["a.png", "b.png", "copy.png", "late/c.png", "upright.png"]
    assert found.store.paths == [str(found.source.paths[i]) for i in found.readable]
    assert found.facts[names.index("copy.png")].findings == ("exact duplicate of a.png",)
    assert found.facts[names.index("empty.png")].unreadable
    assert (found.image_size, found.grid, found.store.shape) == ((64, 96), (4, 6), (24, 152))
    assert found.seconds.keys() == {"features", "quality"}
    assert min(found.seconds.values()) > 0


def test_embeddings_belong_to_their_paths(root, backbone):
    found = gathered(root, backbone, batch_size=2)
    images = found.store.images()
    place = {path.rsplit("/", 1)[-1]: row for row, path in enumerate(found.store.paths)}
    assert (images[place["a.png"]] == images[place["copy.png"]]).float().mean() > 0.99
    alone = gathered([root / "late/c.png"], backbone, root=root)
    assert alone.source.names == ["late/c.png"]
    assert (alone.store.images()[0] - images[place["c.png"]]).abs().max() < 0.02  # half precision


def test_without_a_size_it_is_the_shape_of_most_images(root, backbone):
    found = gathered(root, backbone, image_size=None)
    assert found.image_size == (192, 352)
    assert found.grid == (12, 22)


def test_names_to_look_for_and_a_limit_to_memory(root, backbone):
    Image.open(root / "a.png").save(root / "other.bmp")
    found = gathered(root, backbone, extensions=(".bmp",), memory_limit_mb=0)
    assert found.source.names == ["other.bmp"]
    assert found.store.on_disk


def test_without_an_image_it_says_why(root, backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gathered(tmp_path / "nowhere", backbone)
    for path in root.rglob("*.png"):
        path.write_text("not an image")
    with pytest.raises(ValueError, match=r"None of the 7 images can be read. The first is .*a\.png \(.+\)"):
        gathered(root, backbone)


def test_versions_are_those_of_this_machine():
    import torch

    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"] == torch.__version__
    assert {"python", "anomalib", "anomalib-metarefine", "timm", "numpy"} < versions().keys()


def test_every_file_is_read_and_decoded_once(root, backbone, monkeypatch):
    reads, decodes = Counter(), Counter()
    read, decode = reading.read_bytes, reading._decode
    monkeypatch.setattr(reading, "read_bytes", lambda path: reads.update([Path(path).name]) or read(path))
    monkeypatch.setattr(reading, "_decode", lambda content, *rest: decodes.update([rest[0]]) or decode(content, *rest))
    names = [Path(path).name for path in gathered(root, backbone, image_size=None).source.names]
    assert reads == Counter(names)
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.png") if path.stat().st_size]
    assert decodes == Counter(contents)


def test_features_are_of_the_bytes_that_were_hashed(root, backbone, monkeypatch):
    """A file is replaced right after it is read."""
    first, read = root / "a.png", reading.read_bytes
    before = hashlib.sha256(first.read_bytes()).hexdigest()
    expected = gathered(root, backbone).store.images()

    def replacing(path):
        content = read(path)
        part(np.random.default_rng(1), (64, 128), defect=True).save(path)
        return content

    monkeypatch.setattr(reading, "read_bytes", replacing)
    found = gathered(root, backbone)
    assert found.facts[0].sha256 == before
    assert torch.equal(found.store.images(), expected)


def test_a_file_that_vanishes_is_unreadable_and_the_run_goes_on(root, backbone, monkeypatch):
    read = reading.read_bytes

    def vanishing(path):
        if Path(path).name == "b.png":
            Path(path).unlink()
        return read(path)

    monkeypatch.setattr(reading, "read_bytes", vanishing)
    found = gathered(root, backbone)
    gone = found.facts[found.source.names.index("b.png")]
    assert gone.unreadable.startswith("FileNotFoundError")
    assert "b.png" in gone.unreadable
    assert len(found.readable) == 4


@pytest.mark.parametrize("kind", ["16 bits", "12 in 16 bits", "turned"])
def test_the_same_picture_in_another_file_has_the_same_features(root, backbone, kind):
    expected = gathered(root, backbone).store.images()
    for path in root.rglob("*.png"):
        try:
            grey = np.asarray(Image.open(path))
        except OSError:
            continue
        if kind == "turned":
            exif = Image.Exif()
            exif[274] = 6
            Image.fromarray(np.rot90(grey)).save(path, exif=exif)
        else:
            Image.fromarray((grey / 255 * (65535 if kind == "16 bits" else 4095)).round().astype(np.uint16)).save(path)
    found = gathered(root, backbone, bit_depth=12 if kind == "12 in 16 bits" else None)
    torch.testing.assert_close(found.store.images(), expected, rtol=0.1, atol=0.1)


def test_unused_bits_are_said_aloud(root, backbone, caplog):
    for path in [root / "empty.png", root / "aa.png"]:
        Image.fromarray(np.asarray(Image.open(root / "a.png")).astype(np.uint16) * 16).save(path)
    gathered(root, backbone)
    assert "2 images are darker than they need be: each uses 12 of 16 bits. Pass that depth" in caplog.text
    assert "anomalib's datamodules would misread 2 of the images" in caplog.text
    assert "aa.png has more than 8 bits per channel" in caplog.text


def test_a_folder_of_blank_images_is_an_error(tmp_path, backbone):
    for level in (3, 90):
        Image.new("L", (64, 96), level).save(tmp_path / f"{level}.png")
    with pytest.raises(ValueError, match=r"All 2 images are blank: each is of a single colour\. The first is .*3\.png"):
        gathered(tmp_path, backbone)


def test_near_copies_of_very_many_images_are_not_looked_for_and_that_is_said(root, backbone, monkeypatch, caplog):
    Image.open(root / "a.png").resize((127, 63)).resize((128, 64)).save(root / "near.png")
    found = gathered(root, backbone)
    assert found.facts[found.source.names.index("near.png")].findings == ("near duplicate of a.png",)
    for module in (quality, extract, gather_module):
        monkeypatch.setattr(module, "MOST_COMPARED", 7)
    found = gathered(root, backbone)
    assert found.facts[found.source.names.index("near.png")].findings == ()
    assert found.facts[found.source.names.index("copy.png")].findings == ("exact duplicate of a.png",)
    assert "Near copies are not looked for among 8 images" in caplog.text
