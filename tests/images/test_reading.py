"""One decoder. Each kind of image gives the right pixels or a clear refusal, here and in anomalib's own reader."""

import hashlib
import io
import os
import subprocess
import sys
import tracemalloc

import cv2
import numpy as np
import pytest
import tifffile
from anomalib.data.utils import read_image as anomalib_read_image
from PIL import Image

from anomalib_metarefine.images import reading
from anomalib_metarefine.images.reading import (
    UnreadableImageError,
    check_images,
    decode_image,
    header_size,
    read_image,
)

HEIGHT, WIDTH = 6, 10
RAMP = np.linspace(0.02, 0.98, HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3)
UNTURN = {  # how the file lies, by the orientation that brings it upright
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def levels(dtype, white, channels=3):
    """The ramp in a file's own levels."""
    image = RAMP if channels == 3 else RAMP[..., 0]
    return (image * white).round().astype(dtype) if np.dtype(dtype).kind in "ui" else image.astype(dtype)


def write(path, array, orientation=1):
    """An RGB or grey array in a file that lies as its EXIF tag says."""
    array = np.ascontiguousarray(UNTURN[orientation](array))
    if array.dtype == np.uint8:
        exif = Image.Exif()
        if orientation > 1:
            exif[274] = orientation
        Image.fromarray(array).save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))
    elif path.suffix == ".png":
        path.write_bytes(cv2.imencode(".png", array[..., ::-1] if array.ndim == 3 else array)[1].tobytes())
        if orientation > 1:
            path.write_bytes(with_png_exif(path.read_bytes(), orientation))
    else:
        tags = [(274, "H", 1, orientation, True)] if orientation > 1 else []
        photometric = "rgb" if array.ndim == 3 else "minisblack"
        tifffile.imwrite(path, array, photometric=photometric, extratags=tags)
    return path


def with_png_exif(content, orientation):
    """The chunk that Pillow writes, in a file that it can't."""
    exif, donor = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.new("L", (1, 1)).save(donor, "PNG", exif=exif)
    start = donor.getvalue().index(b"eXIf") - 4
    chunk = donor.getvalue()[start : start + 12 + int.from_bytes(donor.getvalue()[start : start + 4], "big")]
    return content[:33] + chunk + content[33:]


# Container, type, level of white, channels, --bit-depth
GOOD = [
    *[(suffix, np.uint8, 255, channels, None) for suffix in (".png", ".bmp", ".tif", ".webp") for channels in (1, 3)],
    *[(suffix, np.uint16, 65535, channels, None) for suffix in (".png", ".tif") for channels in (1, 3)],
    *[(suffix, np.uint16, 4095, channels, 12) for suffix in (".png", ".tif") for channels in (1, 3)],
    (".tif", np.int32, 2**20 - 1, 1, 20),
    (".tif", np.int16, 4095, 1, 12),
    (".tif", np.float32, 1, 1, None),
    (".tif", np.float32, 1, 3, None),
    (".tif", np.float64, 1, 1, None),
]


@pytest.mark.parametrize(("suffix", "dtype", "white", "channels", "bit_depth"), GOOD)
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_kind_gives_its_pixels_upright(tmp_path, suffix, dtype, white, channels, bit_depth, orientation):
    if suffix == ".bmp" and orientation > 1:
        pytest.skip("BMP has no EXIF tag")
    file = levels(dtype, white, channels)
    path = write(tmp_path / f"image{suffix}", file, orientation)
    image = read_image(path, bit_depth)
    expected = np.broadcast_to(file.reshape(HEIGHT, WIDTH, -1), (HEIGHT, WIDTH, 3)).astype(np.float32)
    np.testing.assert_allclose(image.pixels, expected / np.float32(white), rtol=1e-7)
    assert image.pixels.dtype == np.float32
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    if np.dtype(dtype).kind != "f" or (dtype is np.float32 and channels == 1):  # Pillow can open it, and tell
        assert image.turned == (orientation > 1)
        assert header_size(path) == (HEIGHT, WIDTH)
    try:
        same = np.array_equal(anomalib_read_image(path, as_tensor=True).permute(1, 2, 0).numpy(), image.pixels)
    except OSError:  # anomalib's reader can't read it at all
        same = False
    assert same or image.misread
    assert orientation > 1 or image.misread is None or not same  # of turned TIFF files, Pillow reads some upright


def test_eight_bits_are_what_anomalib_reads_to_the_last_bit(tmp_path):
    every_level = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.stack([every_level, every_level.T, every_level[::-1]], axis=2)
    rgb, files = Image.fromarray(colours), {}
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        rgb.convert(mode).save(tmp_path / f"{mode}.png")
    rgb.save(tmp_path / "quality.jpg", quality=90)
    rgb.convert("L").save(tmp_path / "grey.jpg")
    rgb.convert("CMYK").save(tmp_path / "CMYK.jpg")
    rgb.convert("CMYK").save(tmp_path / "CMYK.tif")
    rgb.save(tmp_path / "lossy.webp")
    for path in tmp_path.iterdir():
        image = read_image(path)
        files[path.name] = image.grey
        expected = anomalib_read_image(path, as_tensor=True).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(image.pixels, expected, err_msg=path.name)
        assert image.misread is None
    assert sorted(name for name, grey in files.items() if grey) == ["1.png", "L.png", "LA.png", "grey.jpg"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparency_is_laid_over_black(tmp_path, dtype):
    full = np.iinfo(dtype).max
    pixels = np.full((4, 4, 4), full, dtype)
    pixels[:2, :, 3] = 0
    (tmp_path / "alpha.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    image = read_image(tmp_path / "alpha.png")
    assert (image.pixels[:2] == 0).all()
    assert (image.pixels[2:] == 1).all()
    assert image.misread


def test_a_transparent_palette_colour_is_black(tmp_path):
    palette = Image.fromarray(np.tile(np.arange(2, dtype=np.uint8), (4, 2)))
    palette.putpalette([255, 255, 255, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    image = read_image(tmp_path / "palette.png")
    assert (image.pixels[:, ::2] == 0).all()
    assert (image.pixels[:, 1::2] == [0, 1, 0]).all()
    assert image.misread == "has transparent pixels"


def test_of_several_pages_the_first_is_taken(tmp_path):
    pages = [Image.new("L", (4, 4), level) for level in (255, 0, 0)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    image = read_image(tmp_path / "pages.tif")
    assert image.pages == 3
    assert (image.pixels == 1).all()


REFUSED = {
    "32 bits": (levels(np.int32, 2**20, 1), "full scale is not known. Pass the bit depth"),
    "unsigned 32 bits": (levels(np.uint32, 2**20, 1), "full scale is not known. Pass the bit depth"),
    "signed": (levels(np.int16, 2**12, 1), "full scale is not known. Pass the bit depth"),
    "signed 8 bits": (levels(np.int8, 100, 1), "full scale is not known. Pass the bit depth"),
    "counts in floating point": (levels(np.float32, 1, 1) * 300, r"from 6 to 290.782, expected \[0, 1\]. Divide them"),
    "not a number": (np.full((4, 4), np.nan, np.float32), r"expected \[0, 1\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_levels_that_mean_nothing_are_refused(tmp_path, kind):
    array, reason = REFUSED[kind]
    tifffile.imwrite(tmp_path / "image.tif", array)
    with pytest.raises(UnreadableImageError, match=rf"image\.tif can't be read as an image: .*{reason}"):
        read_image(tmp_path / "image.tif")


def test_levels_above_the_bit_depth_are_refused(tmp_path):
    path = write(tmp_path / "image.png", levels(np.uint16, 65535))
    with pytest.raises(UnreadableImageError, match="but 12 bits hold 0 to 4095"):
        read_image(path, bit_depth=12)
    for wrong in (0, 33, True, 12.5):
        with pytest.raises(ValueError, match="bit_depth must be a whole number from 1 to 32, found"):
            read_image(path, bit_depth=wrong)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "endless.png"):
        # In a process of its own: the code before waited for good, or filled the memory.
        code = f"from anomalib_metarefine.images.reading import read_image; read_image({str(tmp_path / name)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert f"{name} can't be read as an image: it is no regular file" in done.stderr
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="folder"):
        read_image(tmp_path / "folder.png")


def test_no_more_than_a_stated_number_of_bytes_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "image.png", levels(np.uint8, 255))
    monkeypatch.setattr(reading, "LARGEST_FILE", path.stat().st_size)
    read_image(path)
    monkeypatch.setattr(reading, "LARGEST_FILE", path.stat().st_size - 1)
    with pytest.raises(UnreadableImageError, match="it is larger than"):
        read_image(path)


def test_memory_is_asked_for_by_the_size_of_the_file(tmp_path):
    """It was the largest size allowed, 1 GiB, for each of eight files read at once."""
    path = tmp_path / "small.png"
    path.write_bytes(bytes(1000))
    tracemalloc.start()
    try:
        assert len(reading.read_bytes(path)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_hash_and_pixels_are_of_the_same_bytes():
    content = cv2.imencode(".png", levels(np.uint8, 255, 1))[1].tobytes()
    assert decode_image(content).sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(UnreadableImageError, match=r"^The data can't be read as an image: OSError"):
        decode_image(content[:-40])


def test_tells_the_readable_from_the_broken(tmp_path):
    good, truncated, empty = (tmp_path / name for name in ("good.png", "truncated.png", "empty.png"))
    Image.new("RGB", (40, 30), "red").save(good)
    truncated.write_bytes(good.read_bytes()[:60])
    empty.touch()
    deep = write(tmp_path / "deep.png", levels(np.uint16, 65535))
    missing = tmp_path / "missing.png"
    checked = check_images([good, truncated, empty, deep, missing])
    assert checked.hashes == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (good, deep)}
    assert list(checked.unreadable) == [str(path) for path in (truncated, empty, missing)]
    assert checked.unreadable[str(empty)] == "the file is empty"
    assert "missing.png" in checked.unreadable[str(missing)]
    assert checked.misread == {str(deep): "has more than 8 bits per channel"}
    assert checked.constant == [str(good)]


def test_neither_torch_nor_anomalib_is_needed():
    code = "import sys; sys.modules.update(torch=None, anomalib=None); import anomalib_metarefine.images.reading"
    subprocess.run([sys.executable, "-c", code], check=True)
