import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from PIL import Image

from anomalib_metarefine import use_offline_weights
from anomalib_metarefine.curation.manifest import Manifest, data_sha256, file_sha256
from tests.conftest import folder


def make_files(root: Path) -> Path:
    """A file for each of `DECISIONS`."""
    for name in DECISIONS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def make_manifest(root: Path, decisions: dict[str, str], **columns) -> Manifest:
    """A manifest of files that exist, with the decision given for each."""
    count = len(decisions)
    table = pd.DataFrame(
        {
            "image_path": list(decisions),
            "sha256": [file_sha256(root / path) for path in decisions],
            "decision": list(decisions.values()),
            "decided_by": "rule",
            "round": [int(decision == "reject") for decision in decisions.values()],
            "reason": "The tail of the patch scores, mostly.",
            "score": np.linspace(0, 5, count),
            "fence_distance": np.linspace(-3, 2, count),
            "dirty_probability": np.linspace(0, 1, count),
            "uncertainty": 0.1,
            "score_tail": 1 / 3,
            "score_round_1": 0.1 + 0.2,
            "quality": "",
            **columns,
        }
    )
    return Manifest(table, {"root": str(root), "source": str(root), "seed": 0})


@pytest.fixture
def files(tmp_path):
    """Six small files in two folders."""
    root = tmp_path / "data"
    for i in range(6):
        path = root / ("left" if i < 3 else "right") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content {i}".encode())
    return root


DECISIONS = {
    "left/0.png": "keep",
    "left/1.png": "keep",
    "left/2.png": "review",
    "right/3.png": "reject",
    "right/4.png": "review",
    "right/5.png": "reject",
}


@pytest.fixture
def manifest(files):
    return make_manifest(files, DECISIONS)


def test_comes_back_from_its_files_to_the_last_bit(files, tmp_path):
    names = dict.fromkeys(DECISIONS, "keep")
    for odd in ["NA", "007", 'com,ma "quoted".png', "schön ß.png", "line\nbreak.png", " space.png"]:
        (files / odd).write_bytes(odd.encode())
        names[odd] = "reject"
    scores = np.random.default_rng(0).normal(size=len(names))
    scores[3] = np.nan
    manifest = make_manifest(files, names, score=scores, note="a column of the user's")
    written = manifest.write(tmp_path / "out")
    for path in (written, tmp_path / "out"):
        again = Manifest.read(path)
        pd.testing.assert_frame_equal(again.table, manifest.table, check_exact=True)
        assert again.run == {**manifest.run, "counts": {"keep": 6, "reject": 6, "review": 0}}
        assert again.verify() == ([], [])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.csv", "run.json"]


def test_columns_are_put_in_order(manifest):
    table = manifest.table.assign(score_round_10=1.0, score_round_2=1.0)
    shuffled = table.sample(frac=1, random_state=0)[sorted(table.columns, reverse=True)]
    assert Manifest(shuffled, manifest.run).table.columns.tolist() == [
        *["image_path", "sha256", "decision", "decided_by", "round", "reason"],
        *["score", "fence_distance", "dirty_probability", "uncertainty", "score_tail"],
        *["score_round_1", "score_round_2", "score_round_10", "quality"],
    ]
    assert Manifest(shuffled, manifest.run).table.image_path.tolist() == list(DECISIONS)


def test_a_failed_write_leaves_the_old_manifest(manifest, tmp_path, monkeypatch):
    manifest.write(tmp_path / "out")
    before = (tmp_path / "out" / "manifest.csv").read_bytes()
    manifest.table.loc[0, "decision"] = "reject"

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        manifest.write(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.csv").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.csv", "run.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decision": "maybe"}, r"decision must be one of \['keep', 'reject', 'review'\]; found maybe"),
        ({"decided_by": "magic"}, "decided_by must be one of"),
        ({"image_path": "left/0.png"}, "5 images are listed more than once: left/0.png"),
        ({"image_path": [f"../{i}" for i in range(6)]}, "relative to the root and inside of it; found ../0"),
        ({"image_path": [f"/tmp/{i}" for i in range(6)]}, "relative to the root and inside of it"),
        ({"dirty_probability": 1.5}, r"dirty_probability must lie in \[0, 1\]; found 1.5"),
        ({"score": "high"}, "score must be a number"),
        ({"round": 0.5}, "round must be a whole number, found 0.5"),
        ({"round": np.nan}, "round must be a whole number"),
    ],
)
def test_says_what_is_wrong_with_a_table(manifest, change, message):
    with pytest.raises(ValueError, match=message):
        Manifest(manifest.table.assign(**change), manifest.run)


def test_says_what_is_wrong_with_the_files(manifest, tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected manifest.csv and run.json"):
        Manifest.read(tmp_path)
    out = tmp_path / "out"
    manifest.write(out)
    run = (out / "run.json").read_text()
    manifest.table.drop(columns="reason").to_csv(out / "manifest.csv", index=False)
    with pytest.raises(ValueError, match=r"manifest.csv can't be used: a manifest needs the columns \['reason'\]"):
        Manifest.read(out)
    for text, message in [
        ("{", "no valid JSON"),
        (run.replace("manifest/1", "manifest/9"), "has schema 'metarefine-manifest/9'"),
        ("{}", "must be the absolute folder of the images, found None"),
    ]:
        (out / "run.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Manifest.read(out)


def test_orders_by_what_a_person_looks_at_first(files):
    manifest = make_manifest(
        files,
        dict(zip(DECISIONS, ["reject", "reject", "reject", "review", "review", "review"], strict=True)),
        score=[1.0, np.nan, 2.0, 0, 0, 0],
        dirty_probability=[0.9, 0.9, 0.9, 0.2, 0.6, 0.4],
        uncertainty=[0, 0, 0, 9.0, 1.0, 2.0],
    )
    assert [path.name for path in manifest.rejected] == ["2.png", "0.png", "1.png"]
    assert [path.name for path in manifest.review] == ["5.png", "4.png", "3.png"]
    assert manifest.kept == []
    assert manifest.rejected[0] == files / "left" / "2.png"


def test_verdict(manifest):
    assert manifest.verdict == "2 of 6 images (33.3 %) were rejected, 2 need your eyes."
    manifest.run["contamination"] = {"estimate": 0.08, "low": 0.05, "high": 0.125, "level": 0.9, "visible_split": False}
    assert manifest.verdict.endswith(
        "Estimated share of dirty images: 8 % (90 % interval 5 to 12.5 %). "
        "The scores show no visible split between clean and dirty images."
    )
    assert manifest.verdict in repr(manifest)
    manifest.run["contamination"]["answers"] = 1
    assert "share of dirty images, with your 1 answer: 8 %" in manifest.verdict


def test_verify_reads_the_bytes(manifest, files):
    stat = (files / "left/0.png").stat()
    (files / "left/0.png").write_bytes(b"CONTENT 0")  # same size, same time
    os.utime(files / "left/0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (files / "right/5.png").unlink()
    assert manifest.verify() == (["right/5.png"], ["left/0.png"])
    assert manifest.verify(["review"]) == ([], [])
    with pytest.raises(ValueError, match=r"1 missing \(right/5.png\), 1 changed \(left/0.png\)"):
        manifest.require_unchanged()


def test_images_that_moved_with_their_root_are_found(manifest, files, tmp_path):
    manifest.write(tmp_path / "out")
    shutil.move(files, tmp_path / "elsewhere")
    assert len(Manifest.read(tmp_path / "out").verify().missing) == 6
    assert Manifest.read(tmp_path / "out", root=tmp_path / "elsewhere").verify() == ([], [])


def test_hash_of_the_data_set_ignores_order_only():
    first = data_sha256(["a", "b"], ["1", "2"])
    assert first == data_sha256(["b", "a"], ["2", "1"])
    assert first != data_sha256(["a", "b"], ["2", "1"])


class TestDiff:
    def test_of_the_same_is_empty(self, manifest):
        assert manifest.diff(manifest).empty

    def test_recognises_moved_and_edited_files(self, manifest, files):
        (files / "left/0.png").rename(files / "right/0.png")  # moved, and decided otherwise
        (files / "left/1.png").rename(files / "right/1.png")  # only moved
        (files / "left/2.png").write_bytes(b"edited")  # the path remains, decided otherwise
        (files / "right/5.png").unlink()
        (files / "new.png").write_bytes(b"new")
        later = make_manifest(
            files,
            {
                "right/0.png": "reject",
                "right/1.png": "keep",
                "left/2.png": "keep",
                "right/3.png": "reject",
                "right/4.png": "review",
                "new.png": "keep",
            },
        )
        found = manifest.diff(later).drop(columns="reason").to_numpy().tolist()
        assert found == [
            ["decision", "left/2.png", "left/2.png", "review", "keep"],
            ["added", "new.png", "", "", "keep"],
            ["decision", "right/0.png", "left/0.png", "keep", "reject"],
            ["removed", "right/5.png", "right/5.png", "reject", ""],
        ]

    def test_exact_copies_and_unreadable_files_are_not_mixed_up(self, files):
        for name in ("0", "1"):
            (files / "left" / f"{name}.png").write_bytes(b"twin")
        before = make_manifest(files, DECISIONS, sha256=["twin", "twin", "", "", "4", "5"])
        renamed = {name.replace("left", "moved"): decision for name, decision in DECISIONS.items()}
        after = make_manifest(files, renamed, sha256=["twin", "twin", "", "", "4", "5"])
        changes = before.diff(after)
        # Twins pair off; a file that could not be read is known by its path only.
        assert list(zip(changes.change, changes.image_path, strict=True)) == [
            ("removed", "left/2.png"),
            ("added", "moved/2.png"),
        ]


class TestDatamodule:
    @pytest.fixture
    def curated(self, parts):
        names = [f"train/good/{i:03d}.png" for i in range(24)]
        decisions = dict(zip(names, ["reject"] * 4 + ["review"] * 2 + ["keep"] * 18, strict=True))
        return make_manifest(parts, decisions)

    def test_without_a_test_set(self, curated):
        datamodule = curated.datamodule(num_workers=0, train_batch_size=4)
        datamodule.setup()
        assert len(datamodule.train_data) == 20
        assert set(datamodule.train_data.samples.label_index) == {0}
        assert next(iter(datamodule.train_dataloader())).image.shape == (4, 3, 96, 96)
        datamodule = curated.datamodule(review="reject")
        datamodule.setup()
        assert datamodule.train_data.samples.image_path.tolist() == [str(path) for path in curated.kept]

    @pytest.mark.parametrize(("mode", "test", "val"), [("same_as_test", 16, 16), ("from_test", 8, 8), ("none", 16, 0)])
    def test_keeps_the_users_test_set(self, curated, parts, mode, test, val):
        theirs = folder(parts, val_split_mode=mode, seed=3)
        datamodule = curated.datamodule(test=theirs)
        assert not hasattr(theirs, "test_data")  # the user's datamodule is not set up behind their back
        theirs.setup()
        datamodule.setup()
        assert len(datamodule.train_data) == 20
        assert datamodule.test_data.samples.image_path.tolist() == theirs.test_data.samples.image_path.tolist()
        assert datamodule.test_data.samples.label_index.tolist() == theirs.test_data.samples.label_index.tolist()
        assert (len(datamodule.test_data), len(getattr(datamodule, "val_data", []))) == (test, val)
        assert (datamodule.train_batch_size, datamodule.num_workers) == (8, 0)

    def test_from_a_config_without_normal_test_images(self, curated, parts):
        settings = {"name": "parts", "root": str(parts), "normal_dir": "train/good", "abnormal_dir": "test/blob"}
        settings |= {"test_split_mode": "none", "val_split_mode": "none"}
        (parts / "data.yaml").write_text(yaml.safe_dump({"data": {"class_path": "Folder", "init_args": settings}}))
        datamodule = curated.datamodule(test=parts / "data.yaml")
        datamodule.setup()
        assert (len(datamodule.train_data), len(datamodule.test_data)) == (20, 8)

    def test_warns_of_test_images_that_are_trained_on(self, curated, parts, caplog):
        curated.datamodule(test=Folder(name="same", root=parts, normal_dir="test/good", normal_test_dir="train/good"))
        assert "20 test images are training images too: " in caplog.text

    def test_a_validation_folder_becomes_the_test_set(self, curated, parts, caplog):
        datamodule = curated.datamodule(test=folder(parts, val_split_mode="from_dir"))
        datamodule.setup()
        assert datamodule.val_data.samples.equals(datamodule.test_data.samples)
        assert "parts has a validation folder" in caplog.text

    def test_settings_win(self, curated, parts):
        settings = {"name": "mine", "eval_batch_size": 3, "val_split_mode": "none"}
        datamodule = curated.datamodule(test=folder(parts), **settings)
        assert {name: getattr(datamodule, name) for name in settings} == settings

    def test_refuses(self, curated, parts):
        with pytest.raises(ValueError, match="synthetic and vanishes"):
            curated.datamodule(test=folder(parts, test_split_mode="synthetic"))
        with pytest.raises(ValueError, match="review must be"):
            curated.datamodule(review="maybe")
        nothing = make_manifest(parts, {"train/good/000.png": "reject"})
        with pytest.raises(ValueError, match="nothing to train on: {'keep': 0, 'reject': 1, 'review': 0}"):
            nothing.datamodule()
        (parts / "train/good/000.png").unlink()  # a rejected image may be gone
        curated.datamodule()
        (parts / "train/good/010.png").unlink()
        with pytest.raises(ValueError, match=r"1 missing \(train/good/010.png\)"):
            curated.datamodule()

    def test_trains_padim_without_a_test_set(self, curated, tmp_path):
        use_offline_weights()
        engine = Engine(default_root_dir=tmp_path / "runs", logger=False, accelerator="cpu", limit_val_batches=0)
        engine.fit(padim(), datamodule=curated.datamodule(num_workers=0))
        assert engine.trainer.num_training_batches == 1
        assert engine.trainer.current_epoch == 1

    def test_trains_padim_and_scores_pixels(self, curated, parts, tmp_path):
        use_offline_weights()
        (parts / "masks").mkdir()
        for path in (parts / "test" / "blob").iterdir():
            Image.fromarray((np.array(Image.open(path)) == 250).astype(np.uint8) * 255).save(
                parts / "masks" / path.name
            )
        model = padim()
        engine = Engine(default_root_dir=tmp_path / "runs", logger=False, accelerator="cpu")
        datamodule = curated.datamodule(test=folder(parts, mask_dir="masks"))
        engine.fit(model, datamodule=datamodule)
        (metrics,) = engine.test(model, datamodule=datamodule)
        assert metrics["image_AUROC"] > 0.9
        assert metrics["pixel_AUROC"] > 0.9


def padim() -> Padim:
    layers = ["blocks.2", "blocks.4"]
    return Padim(backbone="tf_efficientnet_lite0", layers=layers, n_features=100, visualizer=False)


def test_run_json_is_for_people_and_other_programs(manifest, tmp_path):
    manifest.run["seconds"] = {"backbone": 1.5}
    manifest.write(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["schema"], run["seconds"], run["counts"]["review"]) == (
        "metarefine-manifest/1",
        {"backbone": 1.5},
        2,
    )
