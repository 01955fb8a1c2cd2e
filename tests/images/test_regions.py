import json

import numpy as np
import pytest
from PIL import Image

from anomalib_metarefine.images.regions import as_text, looked_at, read_regions

LEFT = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_picture_is_black_where_images_are_ignored(tmp_path):
    picture = np.full((40, 60, 3), 255, dtype=np.uint8)
    picture[:10, :30] = 0
    Image.fromarray(picture).save(tmp_path / "mask.png")
    ignored = read_regions(tmp_path / "mask.png")
    assert ignored[:10, :30].all()
    assert ignored.sum() == 300


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", [LEFT]),
        ("b.json", {"size": [40, 60], "polygons": [[[0, 0], [30, 0], [30, 40], [0, 40]]]}),
        ("c.yaml", "- [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]\n"),
        ("d.yml", "size: [40, 60]\npolygons:\n  - [[0, 0], [30, 0], [30, 40], [0, 40]]\n"),
    ],
)
def test_polygons_in_shares_or_in_pixels(tmp_path, name, content):
    looked = looked_at(read_regions(write(tmp_path / name, content)), (2, 4))
    assert as_text(looked, (2, 4)) == ["##..", "##.."]


@pytest.mark.parametrize("grid", [(1, 2), (8, 6), (16, 16), (13, 32)])
def test_half_of_a_place_must_be_covered(grid):
    rows, columns = grid
    ignored = np.zeros((10 * rows, 10 * columns), dtype=bool)
    ignored[:5, :10] = ignored[:4, 10:20] = True
    expected = np.ones(rows * columns, dtype=bool)
    expected[0] = False
    np.testing.assert_array_equal(looked_at(ignored, grid), expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", [[[0, 0], [30, 0], [30, 40]]], "no shares of width and height. For pixels, write"),
        ("a.json", {"size": [40], "polygons": [LEFT]}, r"must hold \[height, width\] of the image as size"),
        ("a.json", {"size": [40, 0], "polygons": [LEFT]}, r"must hold \[height, width\] of the image as size"),
        ("a.json", [LEFT[:2]], "each of at least 3 points"),
        ("a.json", [], "a list of polygons"),
        ("a.json", [[[0, 0], [1, "x"], [1, 1]]], "each of at least 3 points"),
        ("a.json", "[[", "can't be read .*Expected polygons"),
        ("a.yaml", "[[", "(?s)can't be read .*Expected polygons"),
        ("a.png", "no picture", "can't be read as a picture"),
        ("a.json", [[[0, 0], [0, 0], [0, 1]]], None),
    ],
)
def test_what_can_t_be_regions_is_refused(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    if message is None:  # a line is drawn, but covers no place
        with pytest.raises(ValueError, match="cover none of the 4 x 4 places"):
            looked_at(read_regions(path), (4, 4))
        return
    with pytest.raises(ValueError, match=message):
        read_regions(path)


def test_nothing_and_everything_are_no_regions(tmp_path):
    for level, found in ((0, "everything"), (255, "nothing")):
        Image.new("L", (8, 8), level).save(tmp_path / "mask.png")
        with pytest.raises(ValueError, match=f"ignores {found}"):
            read_regions(tmp_path / "mask.png")
    with pytest.raises(FileNotFoundError, match="There is no .*Expected a picture, black"):
        read_regions(tmp_path / "none.png")
