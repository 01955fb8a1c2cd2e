"""From a folder to a verified model: the steps, going on after a stop, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_metarefine.cli import main
from anomalib_metarefine.curation.decisions import append, decide, remember
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.deploy.sidecar import read_sidecar
from anomalib_metarefine.images.answers import Answer, read
from anomalib_metarefine.images.tables import read_table, table_text
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.train.plan import Plan
from anomalib_metarefine.train.report import step_table
from anomalib_metarefine.train.run import Run
from anomalib_metarefine.train.use import held_out, rejected_before, use_of_images
from tests.conftest import part
from tests.curation.test_manifest import DECISIONS, make_files, make_manifest

VERIFIED = {
    "images": 6, "largest_difference": 1e-6, "latency_ms": {"p50": 5.0}, "images_per_second": 200.0, "auroc": None,
    "detection": None, "problems": [],
}  # fmt: skip
FIGURES = {
    "calibrate": {
        "threshold": 2.0, "false_alarm_rate": 0.01, "bound": 0.02, "confidence": 0.95, "images": 4, "set_aside": 0,
        "uncertain": 0.02,
    },
    "export": {"file": "weights/openvino/model.xml", "precision": "FP32", "megabytes": 3.0},
    "verify": VERIFIED,
}  # fmt: skip
STEPS = ["curate", "train", "calibrate", "export", "verify"]


class Quick(Run):
    """A run whose steps write a word each, in place of the minutes they take, and may fail."""

    def __init__(self, out, plan, fails="", **settings):
        super().__init__(out, plan, **settings)
        self.did, self.fails = [], fails

    def _model(self, *_):
        return None, {}

    def _do(self, name, file=None):
        if name == self.fails:
            raise KeyboardInterrupt
        self.did.append(name)
        if file:
            (self.out / file).parent.mkdir(parents=True, exist_ok=True)
            (self.out / file).write_text(name)
        return FIGURES.get(name, {})

    def _curate(self):
        self._do("curate")
        if self.plan.curation is None:
            make_manifest(Path(self.plan.data), DECISIONS).write(self._curation)
        return {"images": len(self.manifest.table), **self.manifest.counts}

    def _train(self):
        self._do("train", "trained.ckpt")
        images = use_of_images(self.manifest, self.plan)
        self._write("images.csv", table_text(images))
        return {"images": int((images.use == "train").sum()), "held_out": int((images.use != "train").sum())}

    def _calibrate(self):
        return self._do("calibrate", "model.ckpt")

    def _export(self):
        return self._do("export", "weights/openvino/model.xml")

    def _verify(self):
        return self._do("verify")


@pytest.fixture
def data(tmp_path):
    return make_files(tmp_path / "data")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize("stopped", STEPS)
def test_goes_on_where_it_was_stopped(data, out, stopped):
    plan = Plan(str(data))
    first = Quick(out, plan, stopped)
    with pytest.raises(KeyboardInterrupt):
        first.go()
    second = Quick(out, plan)
    second.go()
    assert first.did + second.did == STEPS
    assert second.passed
    told = []
    third = Quick(out, plan, say=told.append)
    third.go()
    assert third.did == []
    assert told == [f"{name}: done before" for name in STEPS]
    assert step_table(third.steps).step.tolist() == STEPS
    report = (out / "report.md").read_text()
    assert "The exported model decides like its checkpoint." in report
    assert "threshold 2 from 4 images, 0 set aside; false alarms 2.0% at most (95% confidence), 1.0% asked" in report


def test_images_to_keep_and_for_review_are_trained_on(data, out):
    for review, count in (("keep", 4), ("reject", 2)):
        run = Quick(out / review, Plan(str(data), review=review))
        run.go()
        images = read_table(run.out / "images.csv")
        kept = run.manifest.table[run.manifest.table.decision.isin(["keep", "review"][: 1 + (review == "keep")])]
        assert images.image_path.tolist() == [str(data / path) for path in kept.image_path]
        assert set(images.use) == {"train"}
        assert run.steps["train"].figures == {"images": count, "held_out": 0}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"seed": 1}, "was begun with seed = 0, and this call has 1"),
        ({"model": "Padim"}, "was begun with model = 'MetaRefine', and this call has 'Padim'"),
        ({"settings": {"rounds": 2}}, r"was begun with settings = \{\}, and this call has \{'rounds': 2\}"),
    ],
)
def test_another_setting_is_refused(data, out, setting, told):
    with pytest.raises(KeyboardInterrupt):
        Quick(out, Plan(str(data)), "train").go()
    with pytest.raises(ValueError, match=told):
        Quick(out, Plan(str(data), **setting))


def test_other_images_are_refused(data, out):
    plan = Plan(str(data))
    with pytest.raises(KeyboardInterrupt):
        Quick(out, plan, "calibrate").go()
    Image.new("L", (8, 8), 3).save(data / "new.png")
    with pytest.raises(ValueError, match=r"has other images than the curation in .*: 1 new \(.*new.png\). Pass a new"):
        Quick(out, plan).go()
    (data / "new.png").unlink()
    content = (data / "left/1.png").read_bytes()
    (data / "left/1.png").write_bytes(content + b" ")
    with pytest.raises(ValueError, match=r"not what they were when the manifest was written: 1 changed \(left/1.png\)"):
        Quick(out, plan).go()
    (data / "left/1.png").write_bytes(content)
    Quick(out, plan).go()


def answer(folder, tmp_path, decision):
    table = tmp_path / "answers.csv"
    table.write_text(f"image_path,decision\nleft/1.png,{decision}\n")
    manifest = Manifest.read(folder)
    remember(folder, manifest, read(table))
    decide(manifest, read(table)).write(folder)


def test_a_review_counts_before_the_training_and_not_after_it(data, out, tmp_path):
    plan = Plan(str(data))
    with pytest.raises(KeyboardInterrupt):
        Quick(out, plan, "train").go()
    answer(out / "curation", tmp_path, "reject")  # the rule keeps it
    Quick(out, plan).go()
    assert str(data / "left/1.png") not in read_table(out / "images.csv").image_path.tolist()
    answer(out / "curation", tmp_path, "keep")
    with pytest.raises(ValueError, match="have changed since .* was trained by them. .*pass a new folder, and --curat"):
        Quick(out, plan).go()
    again = Quick(tmp_path / "again", Plan(curation=str(out / "curation")))
    again.go()
    assert again.did == STEPS
    assert str(data / "left/1.png") in read_table(again.out / "images.csv").image_path.tolist()


def test_answers_that_nobody_has_finished_with_count(data, out):
    curation = make_manifest(data, DECISIONS).write(out / "curation").parent
    row = Manifest.read(curation).table.set_index("image_path").loc["left/1.png"]
    append(curation, [Answer("left/1.png", row.sha256, "reject")])
    run = Quick(out / "model", Plan(curation=str(curation)))
    run.go()
    assert row.decision == "keep"
    assert str(data / "left/1.png") not in read_table(run.out / "images.csv").image_path.tolist()


def test_a_result_that_somebody_has_touched_is_refused(data, out):
    Quick(out, Plan(str(data))).go()
    (out / "model.ckpt").write_text("another")
    with pytest.raises(ValueError, match="model.ckpt is not the file that the step calibrate left there"):
        Quick(out, Plan(str(data))).go()


def test_a_folder_of_something_else_is_refused(data, out):
    with pytest.raises(ValueError, match="holds left.* and no train.json. Pass a new or an empty folder"):
        Quick(data, Plan(str(data)))
    out.mkdir()
    (out / "train.json").write_text("{")
    with pytest.raises(ValueError, match="train.json is damaged"):
        Quick(out, Plan(str(data)))


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({}, "There is nothing to train on"),
        ({"curation": "c", "settings": {"rounds": 1}}, "has its decisions and settings already"),
        ({"data": "d", "model": "my.Model"}, "model must be a name in anomalib.models"),
        ({"data": "d", "settings": {"shrinkage": 5}}, "shrinkage must be a number"),
    ],
)
def test_what_can_t_be_is_refused_before_the_work(plan, told):
    with pytest.raises(ValueError, match=told):
        Plan(**plan)


def test_too_few_images_to_hold_some_out():
    with pytest.raises(ValueError, match="39 images are too few: 20 are held out.*at least 40; MetaRefine needs none"):
        held_out(39, 0.01)


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    """44 good parts and 4 with a blob; and a test set."""
    root, rng = tmp_path_factory.mktemp("line7"), np.random.default_rng(0)
    for folder, count, defect in (("train", 44, False), ("test/good", 8, False), ("test/blob", 8, True)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            part(rng, (64, 64), defect).save(root / folder / f"{i:02d}.png")
    for i in range(4):
        part(rng, (64, 64), defect=True).save(root / "train" / f"dirty{i}.png")
    return root


SMALL = ["--image-size", "64", "64", "--settings", "dimensions=32", "meta_steps=1", "adaptation_steps=1"]


def test_metarefine_from_a_folder_to_a_verified_model(plates, out, capsys):
    command = ["train", str(plates / "train"), "--out", str(out), "--test", str(plates / "test"), *SMALL]
    assert main(command) == 0
    told = capsys.readouterr()
    assert f"metarefine watch {out}/weights/openvino FOLDER --out RESULTS.jsonl" in told.out
    assert [line for line in told.err.splitlines() if line.startswith("metarefine: ") and ":" not in line[12:]]
    sidecar = read_sidecar(out / "weights/openvino")
    kept = [path for path in read_table(out / "images.csv").image_path if "dirty" not in path]
    assert len(kept) >= 40
    assert sidecar.calibration["source"] == "leave-one-out scores of the training images"
    state = json.loads((out / "train.json").read_text())["steps"]
    assert state["curate"]["figures"]["reject"] + state["train"]["figures"]["images"] == 48
    assert sidecar.training["images"] == state["train"]["figures"]["images"]
    assert state["verify"]["figures"]["auroc"][1] == 1
    report = (out / "report.md").read_text()
    assert "8 of 8 defective images found" in report
    assert "had the model been trained without it" in report
    assert main(command) == 0
    assert "verify: done before" in capsys.readouterr().err


@pytest.mark.slow
def test_named_variants_and_ignored_regions_from_a_table_to_update_explain_and_eight_bits(tmp_path, capsys):
    rng, rows = np.random.default_rng(0), []
    for i in range(48):
        kind = ("flat", "upright")[i % 2]
        part(rng, (64, 64)).rotate(90 * (i % 2)).save(tmp_path / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{kind}")
    (tmp_path / "first.csv").write_text("\n".join(["image_path,variant", *rows[:44]]) + "\n")
    (tmp_path / "later.csv").write_text("\n".join(["image_path,variant", *rows[44:]]) + "\n")
    Image.fromarray(np.repeat([[0] * 16 + [255] * 48], 64, axis=0).astype(np.uint8)).save(tmp_path / "ignore.bmp")
    out, new = tmp_path / "out", tmp_path / "new.ckpt"
    command = [
        "train",
        str(tmp_path / "first.csv"),
        "--out",
        str(out),
        "--ignore",
        str(tmp_path / "ignore.bmp"),
        *SMALL,
    ]
    assert main([*command, "variants=column", "--quiet"]) == 0
    trained = load_checkpoint(out / "model.ckpt")
    assert set(trained.memory.names) == {"flat", "upright"}
    assert trained.provenance["ignored"] == ["#..."] * 4
    assert main(["update", str(out / "model.ckpt"), "--add", str(tmp_path / "later.csv"), "--out", str(new)]) == 0
    assert "2 of variant upright, as you name it" in capsys.readouterr().out
    assert main(["explain", str(new), str(tmp_path / "47.png")]) == 0
    assert "Taken for variant" in capsys.readouterr().out
    assert main(["export", str(new), "--out", str(tmp_path / "int8"), "--precision", "INT8"]) == 0
    assert read_sidecar(tmp_path / "int8/weights/openvino").model["precision"] == "INT8"


def test_rejected_images_count_where_a_threshold_comes_from_kept_ones(data):
    images = pd.DataFrame({"use": ["train"] * 6 + ["calibrate"] * 4})
    decisions = dict.fromkeys(DECISIONS, "reject")
    assert rejected_before(make_manifest(data, decisions), images) == round(0.4 * len(DECISIONS))
    assert rejected_before(make_manifest(data, decisions, decided_by="user"), images) == 0


@pytest.mark.slow
def test_padim_is_calibrated_on_images_that_it_has_not_seen(plates, out, capsys):
    command = ["train", str(plates / "train"), "--out", str(out), "--model", "Padim", *SMALL, "--quiet"]
    assert main([*command, "--model-args", "n_features"]) == 2
    assert "--model-args takes NAME=VALUE, found 'n_features'" in capsys.readouterr().err
    assert main([*command, "--model-args", "n_features=10"]) == 0
    images = read_table(out / "images.csv")
    assert (images.use == "calibrate").sum() == 20
    model = load_checkpoint(out / "model.ckpt")
    assert type(model).__name__ == "Padim"
    assert set(model.training_images) == set(images.image_path[images.use == "train"])
    assert model.calibration["images"] == 20
    assert model.calibration["source"] == "images that the model was not trained on"
    sizes = [step.size for step in model.pre_processor.transform.transforms if hasattr(step, "size")]
    assert [tuple(size) for size in sizes] == [(64, 64)]
    assert "20 others of those that were kept, drawn at random, were held out" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "Padum"], "There is no model 'Padum'"),
        (["--model", "Padim"], "Padim can't be built on tf_efficientnet_lite0: n_features must be specified"),
        (["--model", "Fastflow", "--model-args", "backbone=resnet18", "pre_trained=false"],
         "Fastflow does not know when to stop training. Set --max-epochs."),
        (["--false-alarm-rate", "0.7"], "false_alarm_rate must be a share"),
    ],
)  # fmt: skip
def test_what_can_t_be_trained_is_told_before_the_curation(data, out, capsys, monkeypatch, arguments, told):
    monkeypatch.setattr(Run, "_curate", lambda _run: pytest.fail("minutes were spent"))
    assert main(["train", str(data), "--out", str(out), "--quiet", *arguments]) == 2
    assert told in capsys.readouterr().err
