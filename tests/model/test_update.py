"""Adding and forgetting images: the same as a fit from scratch, without the old images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.images.reading import file_hash
from anomalib_metarefine.model import update as updating
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.export import write_metadata
from anomalib_metarefine.model.outcome import MOST_DRIFT
from anomalib_metarefine.model.update import known_images, update_checkpoint
from tests.conftest import part
from tests.model.conftest import FIT, fit


def scores(model, line):
    return raw_scores(model, sorted((line / "test").rglob("*.png"))).image


def state(model):
    return {**model.model.scorer.state_dict(), "threshold": model.post_processor.image_threshold}


@pytest.mark.parametrize("reconsider", [False, True])
def test_the_same_as_a_fit_from_scratch_on_the_changed_images(line, checkpoint, tmp_path, reconsider):
    model = load_checkpoint(checkpoint)
    later = sorted((line / "later").iterdir())
    gone = [f"tr{i:03d}.png" for i in (0, 7, 8)]
    found = model.update(add=later, forget=gone, reconsider=reconsider)
    assert found.images.decision.value_counts().to_dict() == {"keep": 7, "reject": 1}
    for name in ("test", "train/good"):
        shutil.copytree(line / name, tmp_path / name)
    for path in later:
        shutil.copy(path, tmp_path / "train/good")
    for name in gone:
        (tmp_path / "train/good" / name).unlink()
    scratch = load_checkpoint(fit(tmp_path, line / "start.pt"))

    def by_name(of, values):
        return dict(sorted(zip((path[-9:] for path in of.refinement.paths), values, strict=True)))

    assert by_name(model, model.refinement.kept) == by_name(scratch, scratch.refinement.kept)
    assert sum(scratch.refinement.kept) == 27
    ours, theirs = (by_name(one, one.left_out_scores) for one in (model, scratch))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    np.testing.assert_allclose(scores(model, line), scores(scratch, line), rtol=1e-5)
    threshold = scratch.post_processor.image_threshold.item()
    assert model.post_processor.image_threshold.item() == pytest.approx(threshold, rel=1e-5)
    assert found.threshold[0] != pytest.approx(threshold, rel=1e-3)


def test_ten_updates_in_a_row_do_not_drift_and_need_no_old_image(line, checkpoint, tmp_path):
    for name in ("test", "train/good"):
        shutil.copytree(line / name, tmp_path / name)
    model = load_checkpoint(checkpoint)
    before = state(model)
    added = sorted((line / "later").iterdir())[:5]
    for path in added:
        model.update(add=[path])
        changed = state(model)
        assert not torch.equal(changed["shift"], before["shift"])
        model.update(forget=[file_hash(path)])
    torch.testing.assert_close(state(model), before, rtol=1e-6, atol=1e-6)
    assert len(model.provenance["history"]) == 10


def test_old_images_need_not_exist(line, tmp_path):
    shutil.copytree(line / "train", tmp_path / "train")
    shutil.copytree(line / "test", tmp_path / "test")
    checkpoint = fit(tmp_path, line / "start.pt", rounds=0)
    dirty = tmp_path / "train/good/tr025.png"
    sha256 = file_hash(dirty)
    shutil.rmtree(tmp_path / "train")
    found = update_checkpoint(checkpoint, tmp_path / "new.ckpt", forget=[dirty, "tr024.png", sha256])
    assert found.forgotten[str(dirty)] == sha256
    assert len(found.forgotten) == 2
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "new.ckpt")
    blobs = sorted((tmp_path / "test/blob").iterdir())
    margin = [raw_scores(one, blobs).image.min() - np.median(one.left_out_scores) for one in (before, after)]
    assert margin[1] > margin[0]
    assert len(after.refinement.paths) == len(after.memory.embeddings) == 24
    assert sha256 not in after.training_images.values()


def test_a_persons_answer_stands_above_the_rule_and_about_old_images(line, checkpoint):
    model = load_checkpoint(checkpoint)
    blob, good = (str(line / "later" / f"la00{i}.png") for i in (7, 0))
    rejected, kept = (str(line / "train/good" / f"tr0{i}.png") for i in (25, 10))
    found = model.update(add=[blob, good], answers={blob: True, good: False, rejected: True, kept: False})
    assert found.images.set_index("image_path").decision.to_dict() == {blob: "keep", good: "reject"}
    assert set(found.images.decided_by) == {"user"}
    assert found.changed == {rejected: "keep", kept: "reject"}
    model.update(reconsider=True)
    decided = dict(zip(model.refinement.paths, model.refinement.kept, strict=True))
    assert [decided[path] for path in (blob, good, rejected, kept)] == [True, False, True, False]
    with pytest.raises(ValueError, match="else.png, which is neither"):
        model.update(answers={"else.png": True})


def test_what_is_known_unreadable_or_was_forgotten_is_skipped(line, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint)
    (tmp_path / "torn.png").write_bytes(b"")
    gone = line / "train/good/tr003.png"
    model.update(forget=[gone])
    copied = shutil.copy(line / "train/good/tr004.png", tmp_path / "copy.png")
    found = model.update(add=[copied, tmp_path / "torn.png", gone])
    assert found.images.empty
    assert found.skipped[str(tmp_path / "torn.png")] == "the file is empty"
    assert found.skipped[str(copied)].endswith("tr004.png")
    assert found.skipped[str(gone)].startswith("it was to be forgotten (2")
    assert model.update(add=[gone], answers={str(gone): True}).images.decision.tolist() == ["keep"]


def test_whose_names_are_not_clear_are_refused_and_nothing_is_changed(line, checkpoint):
    model = load_checkpoint(checkpoint)
    before = state(model)
    with pytest.raises(ValueError, match="nothing.png is none of the 26 images that the model knows, such as"):
        model.update(add=sorted((line / "later").iterdir()), forget=["nothing.png"])
    with pytest.raises(ValueError, match="All 26 images would be forgotten"):
        model.update(forget=model.refinement.paths)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert known_images(model, ["tr001.png"]) == known_images(model, [line / "train/good/tr001.png"])


def test_an_update_is_written_whole_or_not_at_all(line, checkpoint, tmp_path, monkeypatch):
    out, digest = tmp_path / "new.ckpt", file_hash(checkpoint)
    later = sorted((line / "later").iterdir())[:1]

    def killed(content, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(updating.torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            update_checkpoint(checkpoint, out, later)
    assert list(tmp_path.iterdir()) == []
    update_checkpoint(checkpoint, out, later)
    with pytest.raises(FileExistsError, match="exists"):
        update_checkpoint(checkpoint, out, later)
    assert file_hash(checkpoint) == digest


def test_history_is_in_the_metadata_of_an_export(line, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint)
    before = model.provenance["data_sha256"]
    added = line / "later/la001.png"
    model.update(add=[added], forget=["tr001.png"])
    graph = tmp_path / "model.pt"
    graph.touch()
    training = json.loads(write_metadata(model, graph, "torch", "FP32", None).read_text())["training"]
    (entry,) = training["history"]
    assert entry["added"] == [
        {"image_path": str(added), "sha256": file_hash(added), "decision": "keep", "decided_by": "rule"}
    ]
    assert [path[-9:] for path in entry["forgotten"]] == ["tr001.png"]
    assert training["images"] == 26
    assert training["data_sha256"] != before


def test_thresholds_of_other_images_stay_and_it_is_said(line, checkpoint):
    model = load_checkpoint(checkpoint)
    model.post_processor._image_threshold.fill_(9.0)  # as a validation does
    found = model.update(forget=["tr001.png"])
    assert found.threshold == (9.0, 9.0)
    assert any("metarefine calibrate" in line for line in found.lines())


def test_it_says_when_a_new_training_is_due(line, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint)
    assert not model.update(add=sorted((line / "later").iterdir())[:2]).training_due
    rng = np.random.default_rng(1)
    others = []
    for i in range(9):
        others.append(str(tmp_path / f"other{i}.png"))
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(others[-1])
    found = model.update(add=others, answers=dict.fromkeys(others, True))
    assert found.drift > MOST_DRIFT
    assert "drifted by" in found.lines()[-1]


def test_a_model_without_memory_says_so(line, checkpoint):
    assert "remembers): 26 images, 0." in str(load_checkpoint(checkpoint))
    model = load_checkpoint(fit(line, line / "start.pt", "without", remember_mb=0))
    assert "remembers): no images" in str(model)
    with pytest.raises(ValueError, match="does not remember its training images"):
        model.update(forget=["tr001.png"])


def test_a_model_that_ignores_regions_is_updated_as_if_from_scratch(line, tmp_path):
    mask = np.full((96, 96), 255, dtype=np.uint8)
    mask[:32, :32] = 0
    Image.fromarray(mask).save(tmp_path / "ignore.png")
    ignoring = {"ignore": tmp_path / "ignore.png", "patch_fence": 3.0}
    model = load_checkpoint(fit(line, line / "start.pt", "ignoring", **ignoring))
    later = sorted((line / "later").iterdir())
    found = model.update(add=later, forget=["tr007.png"])
    assert found.images.decision.value_counts().to_dict() == {"keep": 7, "reject": 1}
    shutil.copytree(line / "test", tmp_path / "test")
    shutil.copytree(line / "train/good", tmp_path / "train/good")
    (tmp_path / "train/good/tr007.png").unlink()
    for path in later:
        shutil.copy(path, tmp_path / "train/good")
    scratch = load_checkpoint(fit(tmp_path, line / "start.pt", **ignoring))
    assert sum(model.refinement.kept) == sum(scratch.refinement.kept)
    np.testing.assert_allclose(scores(model, line), scores(scratch, line), rtol=1e-5)
    assert model.memory.embeddings.shape[1] == model.model.scorer.patches == 32  # of 36
    blob = sorted((line / "test/blob").iterdir())[0]
    explained = model.explain(blob)
    assert explained.heat.shape == (6, 6)
    assert not explained.regions[0].mask[:2, :2].any()
    assert explained.score == pytest.approx(raw_scores(model, [blob]).image[0], rel=1e-6)


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """Plates of two kinds, which lie in folders of these names, and a model that knows them by these."""
    root = tmp_path_factory.mktemp("products")
    rng = np.random.default_rng(3)
    for name in ("flat", "upright", "more/upright", "more/other", "steel"):
        (root / "line" / name).mkdir(parents=True)
        for i in range(3 if "/" in name else 6 if name == "steel" else 12):
            image = part(rng)
            (image.rotate(90) if name.endswith("upright") else image).save(root / "line" / name / f"{i:02d}.png")
    (root / "line/more").rename(root / "more")
    (root / "line/steel").rename(root / "steel")
    datamodule = Folder("two", root=root / "line", normal_dir=["flat", "upright"], val_split_mode="none", num_workers=0)
    engine = Engine(default_root_dir=root / "results", logger=False, accelerator="cpu", limit_val_batches=0)
    torch.manual_seed(0)
    engine.fit(MetaRefine(**FIT, variants="folders", meta_steps=1), datamodule=datamodule)
    return root, engine.trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize("reconsider", [False, True])
def test_new_images_are_of_the_variant_that_the_user_names(products, tmp_path, reconsider):
    root, checkpoint = products
    model = load_checkpoint(checkpoint)
    assert set(model.memory.names) == {"flat", "upright"}
    moved = shutil.copytree(root / "more/other", tmp_path / "upright")  # they look flat
    (root / "line/steel").symlink_to(root / "steel")
    try:
        steel = sorted((root / "line/steel").iterdir())
        named = str(steel[0])
        found = model.update([*sorted(moved.iterdir()), *steel], reconsider=reconsider, variants={named: "flat"})
    finally:
        (root / "line/steel").unlink()
    rows = found.images.set_index("image_path")
    assert set(rows.loc[[str(path) for path in moved.iterdir()]].variant) == {"upright"}
    assert rows.loc[named].variant == "flat"
    assert set(rows.loc[list(map(str, steel[1:]))].variant) == {"steel"}
    assert set(rows.variant_by) == {"user"}
    placed = {
        path: model.memory.names[v] for path, v in zip(model.refinement.paths, model.memory.variants, strict=True)
    }
    assert [placed[path] for path in rows.index] == rows.variant.tolist()
    assert any("of variant steel, as you name it" in text for text in found.lines())
    assert model.provenance["history"][-1]["added"][0]["variant"]


def test_what_nobody_names_is_placed_by_likeness_and_it_is_said(products, monkeypatch):
    root, checkpoint = products
    model = load_checkpoint(checkpoint)
    monkeypatch.chdir(root)
    found = model.update([Path("more/other", path.name) for path in (root / "more/other").iterdir()])
    assert found.images[["variant", "variant_by"]].drop_duplicates().to_numpy().tolist() == [["flat", "likeness"]]
    assert any("by likeness: neither a column nor the folder names it" in text for text in found.lines())


def test_many_new_images_are_placed_by_old_ones(products, tmp_path):
    """More than are remembered as nearest: the likes of each are new images themselves."""
    model, rng = load_checkpoint(products[1]), np.random.default_rng(4)
    smaller = model.memory.names[1]
    for i in range(26):
        part(rng).rotate(90 * (smaller == "upright")).save(tmp_path / f"{i:02d}.png")
    found = model.update(sorted(tmp_path.iterdir()))
    assert set(found.images.variant) == {smaller}


def test_references_that_were_forgotten_are_counted(line, checkpoint):
    model = load_checkpoint(checkpoint)
    later = sorted((line / "later").iterdir())[:2]
    model.update(add=later)
    found = model.update(forget=[file_hash(later[0]), *(f"tr{i:03d}.png" for i in range(7))])
    assert found.share_forgotten == 7 / 26
    assert "27% of those of the training forgotten" in found.lines()[-1]
    found = model.update(forget=["tr007.png"])
    assert found.share_forgotten == 8 / 26
    assert found.lines()[-1] == (
        "A new training is due: 31% of the images that all were compared with are forgotten (at most 30 %)."
    )
