"""Labels from folders and tables, and what a threshold finds."""

import numpy as np
import pytest

from anomalib_metarefine.model.evaluation import detect, folder_labels, read_labelled
from tests.conftest import part


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/d/good/a.png", "/d/bent/b.png"], [False, True]),
        (["/d/test/OK/a.png", "/d/test/bent/b.png", "/d/train/good/c.png"], [False, True, False]),
        (["/d/good/line1/a.png", "/d/scratch/line1/b.png"], [False, True]),
        (["/d/good/a.png", "/d/good/b.png"], [False, False]),
        (["/d/line1/a.png", "/d/line2/b.png"], None),
        (["/d/a.png", "/d/good/b.png"], None),  # nobody has said what a.png is
        (["/d/new/a.png"], None),
    ],
)
def test_labels_from_folders(paths, expected):
    found = folder_labels(paths)
    assert (None if found is None else found.tolist()) == expected


@pytest.fixture
def tree(tmp_path):
    for name in ("test/good/a.png", "test/bent/b.png", "ground_truth/bent/b_mask.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        part(np.random.default_rng(0), size=(32, 32)).save(path)
    return tmp_path


def test_masks_are_no_images(tree):
    found = read_labelled(tree)
    assert [path.name for path in found.paths] == ["b.png", "a.png"]
    assert found.anomalous.tolist() == [True, False]


@pytest.mark.parametrize(("column", "good", "bad"), [("label_index", "0", "1"), ("label", "Normal", "defective")])
def test_labels_from_a_table(tree, column, good, bad):
    table = tree / "parts.csv"
    table.write_text(f"image_path,{column}\ntest/good/a.png,{good}\ntest/bent/b.png,{bad}\n")
    assert read_labelled(table).anomalous.tolist() == [True, False]
    table.write_text(f"image_path,{column}\ntest/good/a.png,{good}\ntest/bent/b.png,perhaps\n")
    with pytest.raises(ValueError, match=r"'perhaps' for test/bent/b.png. Expected one of"):
        read_labelled(table)
    table.write_text("image_path\ntest/good/a.png\n")
    assert read_labelled(table).anomalous is None


def test_counts_and_rates():
    scores = np.array([*range(100), 50.5, 94.5, 200.0], dtype=float)
    anomalous = np.arange(103) >= 100
    found = detect(scores, anomalous, 97.5)
    assert (found.normal, found.defective, found.chosen.false_alarms, found.chosen.found) == (100, 3, 2, 1)
    assert {rate: (at.false_alarms, at.found) for rate, at in found.at_rates.items()} == {
        0.01: (1, 1), 0.02: (2, 1), 0.05: (5, 2), 0.1: (10, 2),
    }  # fmt: skip
    assert not found.finds_nothing
    assert "WARNING" not in "".join(found.lines())


def test_nothing_found_is_told_in_capitals():
    found = detect(np.array([1.0, 2.0, 1.5]), np.array([False, False, True]), 2.5)
    assert found.finds_nothing
    assert "NOT ONE OF 1 DEFECTIVE IMAGES IS FOUND" in "".join(found.lines())


def test_normal_images_alone_give_false_alarms_only():
    found = detect(np.array([1.0, 2.0]), np.array([False, False]), 1.5)
    assert (found.auroc, found.at_rates, found.finds_nothing) == (None, {}, False)
    assert found.lines() == ["At the threshold 1.5: 1 of 2 normal images called anomalous."]
