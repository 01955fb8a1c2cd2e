"""Why an image has its score."""

import shutil

import numpy as np
import pytest
from PIL import Image

from anomalib_metarefine.cli import main
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint


@pytest.fixture
def blob(line):
    return line / "test/blob/te002.png"


def bright(path):
    """Rows and columns of 16 pixels with the blob, as patches are."""
    pixels = np.asarray(Image.open(path).convert("L")).reshape(6, 16, 6, 16)
    return (pixels == 250).sum((1, 3)) > 0


def test_the_score_comes_from_the_defect(line, checkpoint, blob):
    model = load_checkpoint(checkpoint)
    found = model.explain(blob)
    assert found.score == pytest.approx(raw_scores(model, [blob]).image[0], rel=1e-6)
    assert found.score > found.threshold == model.post_processor.image_threshold.item()
    worst = found.regions[0]
    assert (worst.mask & bright(blob)).any()
    assert found.without < found.score
    assert sum(region.share for region in found.regions) == pytest.approx(1)
    assert found.heat[worst.mask].min() > np.median(found.heat)
    assert (found.variant, found.variants) == (0, 1)


def test_a_copy_in_the_training_is_the_most_alike_but_for_itself(line, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint)
    training = line / "train/good/tr010.png"
    pixels = np.array(Image.open(training))
    pixels[0, 0] += 1
    twin = tmp_path / "twin.png"
    Image.fromarray(pixels).save(twin)
    nearest = model.explain(twin).regions[0].alike[0]
    assert (nearest.path, nearest.kept) == (str(training), True)
    itself = model.explain(shutil.copy(training, tmp_path / "copy.png"))
    assert str(training) not in [alike.path for region in itself.regions for alike in region.alike]


def test_a_defect_is_most_like_the_rejected_ones(line, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint)
    dirty = line / "train/good/tr025.png"
    assert str(dirty) in model.refinement.rejected
    pixels = np.array(Image.open(dirty))
    pixels[0, 0] += 1
    Image.fromarray(pixels).save(tmp_path / "twin.png")
    nearest = model.explain(tmp_path / "twin.png").regions[0].alike[0]
    assert (nearest.path, nearest.kept) == (str(dirty), False)


def test_pictures_and_page(line, checkpoint, blob, tmp_path, capsys):
    png, html = tmp_path / "why.png", tmp_path / "why.html"
    assert main(["explain", str(checkpoint), str(blob), "--png", str(png), "--html", str(html)]) == 0
    printed = capsys.readouterr().out
    assert "anomalous" in printed
    assert "Without its worst region" in printed
    drawn = np.asarray(Image.open(png))
    assert ((drawn == (255, 210, 0)).all(2)).any()
    page = html.read_text()
    assert page.count("data:image/jpeg") == 1 + page.count("<h2>") + page.count("distance") // 2
    assert "http:" not in page


def test_images_that_have_gone_are_said_to_have(line, checkpoint, blob, tmp_path):
    model = load_checkpoint(checkpoint)
    hashes, paths = model.training_images, [path.replace("/train/", "/gone/") for path in model.refinement.paths]
    model.training_images = dict(zip(paths, hashes.values(), strict=True))
    model.refinement.paths[:] = paths
    found = model.explain(blob)
    assert all("no longer there" in text for text in found.lines() if "distance" in text)
    page = found.write_page(tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") == 1 + page.count("<h2>")


def test_what_is_no_image_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    assert main(["explain", str(checkpoint), str(tmp_path / "text.png")]) == 2
    assert "text.png can't be read as an image" in capsys.readouterr().err
