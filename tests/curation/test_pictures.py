"""Small pictures of any image file, and maps and outlines on them."""

import numpy as np
import pytest
from PIL import Image

from anomalib_metarefine.curation.pictures import heat_layer, outline, overlay, thumbnail

GRADIENT = np.linspace(0, 1, 600 * 400).reshape(400, 600)


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("deep.png", Image.fromarray((4095 * GRADIENT).astype(np.uint16))),
        ("float.tif", Image.fromarray(GRADIENT.astype(np.float32))),
        ("grey.jpg", Image.fromarray((255 * GRADIENT).astype(np.uint8))),
        ("binary.png", Image.fromarray(GRADIENT > 0.5)),
        ("palette.png", Image.fromarray((255 * GRADIENT).astype(np.uint8)).convert("RGB").quantize(64)),
        ("cmyk.jpg", Image.fromarray((255 * GRADIENT).astype(np.uint8)).convert("CMYK")),
        ("alpha.png", Image.fromarray((255 * GRADIENT).astype(np.uint8)).convert("RGBA")),
    ],
)
def test_every_kind_of_image_keeps_its_content(tmp_path, file, image):
    image.save(tmp_path / file)
    small = thumbnail(tmp_path / file)
    assert small.mode in ("L", "RGB")
    assert max(small.size) <= 1.25 * 256
    assert small.width / small.height == pytest.approx(1.5, rel=0.02)
    grey = np.asarray(small.convert("L"), dtype=float)
    assert grey[:20].mean() < 40
    assert grey[-20:].mean() > 215


def test_transparent_pixels_are_black_as_for_the_detector(tmp_path):
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(thumbnail(tmp_path / "clear.png").convert("L")).tolist() == np.zeros((64, 64)).tolist()


def test_the_map_lies_on_its_place():
    heat = np.zeros((4, 8))
    heat[0, 7] = 1  # top right
    heat[3, 0] = np.nan
    shown = np.asarray(overlay(Image.new("L", (160, 80), 128), heat, (0.0, 1.0)), dtype=float)
    assert shown.shape == (80, 160, 3)
    colourful = np.ptp(shown, axis=2)
    assert np.unravel_index(colourful.argmax(), colourful.shape)[0] < 20
    assert np.unravel_index(colourful.argmax(), colourful.shape)[1] > 140
    assert (shown[40:, :80] == 128).all()


def test_what_is_usual_stays_visible_under_the_layer():
    layer = np.asarray(heat_layer(np.array([[0.0, 1.0]]), (0.0, 1.0), (80, 40)))
    assert layer.shape == (40, 80, 4)
    assert layer[:, 0, 3].max() == 0
    assert layer[:, -1, 3].min() > 150


def test_an_outline_leaves_what_is_inside():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120), dtype=np.uint8))
    mask = np.zeros((3, 4), dtype=bool)
    mask[1, 2] = True
    drawn = np.asarray(outline(image, mask))
    before = np.asarray(image.convert("RGB"))
    changed = (drawn != before).any(2)
    assert changed[30, 60:90].all()
    assert not changed[33:57, 63:87].any()
    assert not changed[:25].any()
    assert not changed[:, :55].any()
