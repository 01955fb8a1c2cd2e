"""Training with a person's answers, and with regions that nobody looks at."""

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.deploy.sidecar import read_sidecar
from anomalib_metarefine.images.reading import file_hash, read_image
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.graph import Graph
from tests.conftest import folder

SMALL = {"image_size": (96, 96), "dimensions": 32, "meta_steps": 1, "adaptation_steps": 1, "visualizer": False}


def trained(root, **settings) -> tuple[MetaRefine, str]:
    seed_everything(0, verbose=False)
    model = MetaRefine(**SMALL, **settings)
    engine = Engine(default_root_dir=root / "results", logger=False, accelerator="cpu", limit_val_batches=0)
    engine.fit(model, datamodule=folder(root))
    return model.eval(), engine.trainer.checkpoint_callback.best_model_path


def decisions(path, answers):
    lines = [f"{image.name},{file_hash(image)},{decision}" for image, decision in answers.items()]
    path.write_text("\n".join(["image_path,sha256,decision", *lines]) + "\n")
    return path


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_persons_answers_hold(spotted, tmp_path, where):
    images = sorted((spotted / "train/good").iterdir())
    (tmp_path / "curation").mkdir()
    file = decisions(tmp_path / "curation/decisions.csv", {images[3]: "keep", images[0]: "reject", images[1]: "review"})
    model, _ = trained(spotted, decisions=file if where == "file" else file.parent, rule="count:3", rounds=1)
    assert model.provenance["answers"] == 2
    kept = dict(zip(model.refinement.paths, model.refinement.kept, strict=True))
    assert kept[str(images[3])]  # spotted, and rejected by the rule: see below
    assert not kept[str(images[0])]  # the least noisy one


def test_without_answers_the_rule_decides(spotted):
    images = sorted((spotted / "train/good").iterdir())
    model, _ = trained(spotted, rule="count:3", rounds=1)
    assert model.provenance["answers"] == 0
    assert str(images[3]) in model.refinement.rejected
    assert str(images[0]) not in model.refinement.rejected


def test_answers_that_say_nothing_are_refused(spotted, tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no decisions in .*Review the folder first"):
        trained(spotted, decisions=tmp_path / "train")
    (tmp_path / "other").write_text("x")
    file = decisions(tmp_path / "d.csv", {tmp_path / "other": "keep"})
    with pytest.raises(ValueError, match="None of the 1 decisions is about one of the 24 training images"):
        trained(spotted, decisions=file)


def draw(path, image, box):
    pixels = np.asarray(Image.open(image)).copy()
    pixels[box] = 250
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def clamped(tmp_path_factory):
    """Plates of 96 x 96 pixels with a bright clamp that lies elsewhere in every image, in the left third."""
    from tests.conftest import plate

    root = tmp_path_factory.mktemp("clamped")
    rng = np.random.default_rng(0)
    for name in ("train/good", "test/good", "test/blob"):
        (root / name).mkdir(parents=True)
        for i in range(24 if name == "train/good" else 2):
            file = root / name / f"{i:02d}.png"
            plate(2 + 0.2 * i).save(file)
            if i % 2:
                y, x = rng.integers(0, 64), rng.integers(0, 8)
                draw(file, file, np.s_[y : y + 30, x : x + 16])
    Image.fromarray(np.repeat([[0] * 32 + [255] * 64], 96, axis=0).astype(np.uint8)).save(root / "ignore.png")
    return root


@pytest.fixture(scope="module")
def ignoring(clamped):
    return trained(clamped, ignore=clamped / "ignore.png", rounds=1)


def test_what_is_ignored_is_in_no_score_map_or_decision(clamped, ignoring, tmp_path):
    model, _ = ignoring
    plain = sorted((clamped / "train/good").iterdir())[4]
    clamp = draw(tmp_path / "clamp.png", plain, np.s_[30:70, 0:20])
    blob = draw(tmp_path / "blob.png", plain, np.s_[30:50, 70:90])
    before, with_clamp, with_blob = raw_scores(model, [plain, clamp, blob]).image
    looking, _ = trained(clamped, rounds=1)
    looking_before, looking_clamp = raw_scores(looking, [plain, clamp]).image
    # Features see further than their patch, so that a little is left of what lies beside the places looked at.
    assert with_clamp - before < 0.3 * (looking_clamp - looking_before)
    assert with_blob - before > 3 * (with_clamp - before)

    pixels = torch.from_numpy(read_image(blob).pixels.transpose(2, 0, 1)).unsqueeze(0)
    with torch.no_grad():
        bits = model.model(model.pre_processor.transform(pixels)).anomaly_map[0, 0]
    assert bits[:, :8].max() == pytest.approx(bits.min().item())
    assert model.provenance["ignored"] == ["##...."] * 6
    assert model.model.scorer.patches == 24
    with pytest.raises(ValueError, match="8 x 8 patches, but the model was fitted on 36"):
        model.model(torch.zeros(1, 3, 128, 128))


def test_checkpoint_and_graph_ignore_it_too(clamped, ignoring, tmp_path):
    model, checkpoint = ignoring
    (clamped / "ignore.png").rename(clamped / "elsewhere.png")
    try:
        loaded = load_checkpoint(checkpoint)
    finally:
        (clamped / "elsewhere.png").rename(clamped / "ignore.png")
    images = sorted((clamped / "train/good").iterdir())[:6]
    expected = raw_scores(model, images)
    found = raw_scores(loaded, images)
    np.testing.assert_allclose(found.image, expected.image, rtol=1e-6)
    np.testing.assert_allclose(found.pixel, expected.pixel, rtol=1e-6)
    file = loaded.to_openvino(tmp_path)
    graph = Graph(file)
    scale = read_sidecar(file.parent).image_score
    raw = [(graph.scores(read_image(i).pixels).image - 0.5) * (scale["maximum"] - scale["minimum"]) for i in images]
    np.testing.assert_allclose(np.array(raw) + scale["threshold"], expected.image, rtol=1e-3)
    assert read_sidecar(file.parent).training["ignored"] == ["##...."] * 6
