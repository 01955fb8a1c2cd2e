"""Every kind of image file against `curate`, training and `watch`: the same pixels, or a refusal that says why."""

import io
import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
from anomalib.data import Folder
from PIL import Image

from anomalib_metarefine.deploy.arrivals import look
from anomalib_metarefine.deploy.pipeline import Pipeline
from anomalib_metarefine.images.quality import describe_file
from anomalib_metarefine.model.training_images import TrainingImages
from tests.images.test_reading import HEIGHT, RAMP, UNTURN, WIDTH, write

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "files.md"
SIXTEEN = (RAMP * 65535).round().astype(np.uint16)
OPAQUE = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
EIGHT = (RAMP * 255).round().astype(np.uint8)
GREY = EIGHT[..., 0]


def pillow(mode, suffix, **settings):
    def make(path):
        image = Image.fromarray(GREY) if mode in ("1", "L", "LA") else Image.fromarray(EIGHT)
        image.convert(mode).save(path.with_suffix(suffix), **settings)
        return path.with_suffix(suffix)

    return make


def deep(dtype, white, suffix, channels=1):
    def make(path):
        image = RAMP if channels == 3 else RAMP[..., 0]
        scaled = image * white
        array = (scaled.round() if np.dtype(dtype).kind in "iu" else scaled).astype(dtype)
        return write(path.with_suffix(suffix), array)

    return make


def turned(suffix, dtype=np.uint8, white=255):
    def make(path):
        return write(path.with_suffix(suffix), (RAMP[..., 0] * white).round().astype(dtype), 6)

    return make


def transparent(path):
    image = Image.fromarray(EIGHT).convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(WIDTH) < 5, 255, 0).astype(np.uint8)[None].repeat(HEIGHT, 0)))
    image.save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def pages(path):
    first, second = Image.fromarray(EIGHT), Image.new("RGB", (WIDTH, HEIGHT), "red")
    first.save(path.with_suffix(".tif"), save_all=True, append_images=[second])
    return path.with_suffix(".tif")


def tiff(levels, **settings):
    def make(path):
        tifffile.imwrite(path.with_suffix(".tif"), levels, **settings)
        return path.with_suffix(".tif")

    return make


def cut(path):
    content = io.BytesIO()
    Image.fromarray(EIGHT).save(content, "PNG")
    path.with_suffix(".png").write_bytes(content.getvalue()[:-60])
    return path.with_suffix(".png")


def deep_colour_with_alpha(path):
    levels = np.dstack(
        [(RAMP * 65535).round().astype(np.uint16)[..., ::-1], np.full((HEIGHT, WIDTH), 65535, np.uint16)]
    )
    path.with_suffix(".png").write_bytes(cv2.imencode(".png", levels)[1].tobytes())
    return path.with_suffix(".png")


# As a row of the docs begins, how the file is made, --bit-depth; how exact the picture is (None: not compared)
KINDS = [
    ("1 bit, PNG", pillow("1", ".png"), None, None),
    ("grey, PNG", pillow("L", ".png"), None, 0.003),
    ("grey with opaque alpha, PNG", pillow("LA", ".png"), None, 0.003),
    ("palette, PNG", pillow("P", ".png"), None, None),
    ("RGB, PNG", pillow("RGB", ".png"), None, 0.003),
    ("RGB with opaque alpha, PNG", pillow("RGBA", ".png"), None, 0.003),
    ("RGB, BMP", pillow("RGB", ".bmp"), None, 0.003),
    ("RGB, TIFF", pillow("RGB", ".tif"), None, 0.003),
    ("RGB, WebP", pillow("RGB", ".webp", lossless=True), None, 0.003),
    ("grey, JPEG", pillow("L", ".jpg", quality=100), None, 0.02),
    ("RGB, JPEG", pillow("RGB", ".jpg", quality=100), None, None),
    ("CMYK, JPEG", pillow("CMYK", ".jpg", quality=100), None, None),
    ("CMYK, TIFF", pillow("CMYK", ".tif"), None, 0.02),
    ("several pages, TIFF", pages, None, 0.003),
    ("transparent, PNG", transparent, None, None),
    ("turned by EXIF, JPEG", turned(".jpg"), None, None),
    ("turned by EXIF, PNG", turned(".png"), None, 0.003),
    ("turned by EXIF, TIFF", turned(".tif"), None, 0.003),
    ("16 bits, grey, PNG", deep(np.uint16, 65535, ".png"), None, 1e-5),
    ("16 bits, grey, TIFF", deep(np.uint16, 65535, ".tif"), None, 1e-5),
    ("16 bits, RGB, PNG", deep(np.uint16, 65535, ".png", 3), None, 1e-5),
    ("16 bits, RGB, TIFF", deep(np.uint16, 65535, ".tif", 3), None, 1e-5),
    ("16 bits, RGB with alpha, PNG", deep_colour_with_alpha, None, 1e-4),
    ("12 in 16 bits, `--bit-depth 12`, PNG", deep(np.uint16, 4095, ".png"), 12, 2e-4),
    ("12 in 16 bits, `--bit-depth 12`, TIFF", deep(np.uint16, 4095, ".tif"), 12, 2e-4),
    ("16 bits, turned by EXIF, PNG", turned(".png", np.uint16, 65535), None, 1e-5),
    ("16 bits, turned by EXIF, TIFF", turned(".tif", np.uint16, 65535), None, 1e-5),
    ("16 bits, CMYK, TIFF", tiff(np.zeros((HEIGHT, WIDTH, 4), np.uint16), photometric="separated"), None, None),
    (
        "RGB plane by plane, TIFF",
        tiff(EIGHT.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        None,
        0.003,
    ),
    (
        "16 bits, RGB plane by plane, TIFF",
        tiff(SIXTEEN.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        None,
        None,
    ),
    (
        "16 bits, multiplied by its transparency, TIFF",
        tiff(np.dstack([SIXTEEN // 2, OPAQUE // 2]), photometric="rgb", extrasamples=["assocalpha"]),
        None,
        None,
    ),
    (
        "16 bits, grey with alpha, `--bit-depth 12`, TIFF",
        tiff(np.dstack([SIXTEEN[..., :1], OPAQUE]), photometric="minisblack", extrasamples=["unassalpha"]),
        12,
        None,
    ),
    ("levels above `--bit-depth 12`, PNG", deep(np.uint16, 65535, ".png"), 12, None),
    ("signed 16 bits, TIFF", deep(np.int16, 4095, ".tif"), None, None),
    ("signed 16 bits, `--bit-depth 12`, TIFF", deep(np.int16, 4095, ".tif"), 12, 2e-4),
    ("32 bits, TIFF", deep(np.int32, 2**20 - 1, ".tif"), None, None),
    ("32 bits, `--bit-depth 20`, TIFF", deep(np.int32, 2**20 - 1, ".tif"), 20, 1e-5),
    ("floating point in [0, 1], grey, TIFF", deep(np.float32, 1, ".tif"), None, 1e-5),
    ("floating point in [0, 1], RGB, TIFF", deep(np.float32, 1, ".tif", 3), None, 1e-5),
    ("floating point above 1, TIFF", deep(np.float32, 255, ".tif"), None, None),
    ("cut off, PNG", cut, None, None),
]


def curated(path, bit_depth):
    """What `curate` embeds."""
    described, image = describe_file(path, bit_depth)
    return described.unreadable if image is None else image.pixels


def watched(path, bit_depth):
    """What `watch` gives the graph."""
    jobs, images = [], []

    def submit(image, maps):
        images.append(image)
        answer = Future()
        answer.set_result(None)
        return answer

    pipeline = Pipeline(SimpleNamespace(streams=1, bit_depth=bit_depth, submit=submit), jobs.append)
    pipeline.push(look(str(path)))
    pipeline.flush()
    pipeline.close()
    return images[0] if images else str(jobs[0].error)


def trained(path, bit_depth):
    """What anomalib's own datamodule gives the model, after our look at the training images."""
    datamodule = Folder(name="kinds", root=path.parent, normal_dir=".", test_split_mode="none", val_split_mode="none")
    datamodule.setup()
    trainer = SimpleNamespace(datamodule=datamodule, limit_val_batches=1)
    model = SimpleNamespace(is_fitted=False, size_follows_images=False, bit_depth=bit_depth)
    try:
        TrainingImages().setup(trainer, model, "fit")
    except ValueError as error:
        return str(error)
    return datamodule.train_data[0].image.permute(1, 2, 0).numpy()


def rows():
    """Of the docs' table: verdicts about curate and watch, and about training, by kind of file."""
    section = PAGE.read_text(encoding="utf-8").partition("## What an image file means")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (.+?) \| (pixels|refused) \| (pixels|refused) \|$", section, flags=re.MULTILINE)
    return {names: verdicts for names, *verdicts in found}


@pytest.mark.parametrize(("kind", "make", "bit_depth", "exactness"), KINDS, ids=[kind[0] for kind in KINDS])
def test_the_same_pixels_or_a_refusal_as_the_docs_say(tmp_path, kind, make, bit_depth, exactness):
    path = make(tmp_path / "image")
    told = [curated(path, bit_depth), watched(path, bit_depth), trained(path, bit_depth)]
    verdicts = ["refused" if isinstance(one, str) else "pixels" for one in told]
    assert [verdicts[0], verdicts[2]] == rows()[kind]
    assert verdicts[1] == verdicts[0]
    seen = [one for one in told if not isinstance(one, str)]
    for one in seen[1:]:
        np.testing.assert_array_equal(one, seen[0])
    if exactness:
        grey = np.ptp(seen[0], axis=2).max() == 0
        assert np.abs(seen[0] - (RAMP[..., :1] if grey else RAMP)).max() < exactness
    for refusal in (one for one in told if isinstance(one, str)):
        assert re.search(r"convert DATA --to|bit depth|Save it as|Divide them|cannot identify", refusal), refusal


def test_the_docs_speak_of_no_other_kinds():
    assert set(rows()) == {kind[0] for kind in KINDS}


def test_turned_is_turned_back(tmp_path):
    """The table's own helper lays the file on its side."""
    assert UNTURN[6](GREY).shape == (WIDTH, HEIGHT)
    assert Image.open(turned(".png")(tmp_path / "image")).size == (HEIGHT, WIDTH)
