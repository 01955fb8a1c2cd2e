import hashlib

import numpy as np
import pytest
from anomalib.data.utils import read_image as anomalib_read_image
from PIL import Image

from anomalib_metarefine.cli import main
from anomalib_metarefine.images.convert import convert
from anomalib_metarefine.images.reading import read_image

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


@pytest.fixture
def deep(tmp_path):
    """A 12-bit image, one that lies on its side, a usual one and one that is none."""
    root = tmp_path / "deep"
    (root / "late").mkdir(parents=True)
    Image.fromarray((RAMP / 255 * 4095).round().astype(np.uint16)).save(root / "a.tif")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(RAMP)).save(root / "late" / "b.png", exif=exif)
    Image.fromarray(RAMP).save(root / "c.bmp")
    (root / "text.png").write_text("not an image")
    return root


def state(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_copies_are_what_every_reader_reads(deep, tmp_path, capsys):
    before = state(deep)
    assert main(["convert", str(deep), "--to", str(tmp_path / "out"), "--bit-depth", "12"]) == 1
    written = capsys.readouterr()
    assert "3 images. The originals are as they were." in written.out
    assert "not converted: text.png: UnidentifiedImageError" in written.err
    assert state(deep) == before
    for name in ("a.png", "late/b.png", "c.png"):
        copy = tmp_path / "out" / name
        assert read_image(copy).misread is None
        pixels = anomalib_read_image(copy, as_tensor=True).permute(1, 2, 0).numpy() * 255
        np.testing.assert_allclose(pixels, np.repeat(RAMP[..., None], 3, 2), atol=1e-4)


def test_nothing_is_overwritten(deep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"1 files exist already: .*a\.png"):
        convert(deep, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="lies among the images"):
        convert(deep, deep / "out")
    Image.fromarray(RAMP).save(deep / "a.png")
    with pytest.raises(ValueError, match=r"Two images would both be written to .*a\.png"):
        convert(deep, tmp_path / "other")
    assert not (tmp_path / "other").exists()
