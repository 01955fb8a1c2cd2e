import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from anomalib_metarefine.benchmark import training
from anomalib_metarefine.benchmark.cells import LeftOut
from anomalib_metarefine.benchmark.config import BenchConfig
from anomalib_metarefine.benchmark.grid import plan, run
from anomalib_metarefine.benchmark.table import KEY, ResultTable, read_results
from anomalib_metarefine.benchmark.training_sets import Curated, curated_images

MODELS = {
    "PaDiM": {"class_path": "Padim", "init_args": {"n_features": 10}, "batch_size": 8},
    "DFM": {"class_path": "Dfm"},
}
FOUND = [*KEY, "image_AUROC", "image_F1Max", "kept", "rejected", "precision", "recall", "test_normal", "test_abnormal"]


@pytest.fixture
def trained(monkeypatch):
    """Every training, in order, as (model, images, seed)."""
    log = []
    train_and_test = training.train_and_test

    def logged(spec, backbone, layers, train, test, image_size, seed, memo):
        log.append((spec.name, len(train), seed))
        return train_and_test(spec, backbone, layers, train, test, image_size, seed, memo)

    monkeypatch.setattr(training, "train_and_test", logged)
    return log


@pytest.fixture
def few(monkeypatch):
    """The fixture has eight defective images."""
    monkeypatch.setattr("anomalib_metarefine.benchmark.training_sets._LEAST_DEFECTIVE", 2)


def oracle(paths, seed, data, config, folder):
    """A curation that finds all defects but one, and repairs that one with a good image."""
    first, *found = [path for path in paths if "blob" in path] or [""]
    good = next(path for path in paths if "good" in path)
    repaired = folder / "repaired.png"
    repaired.write_bytes(Path(good).read_bytes())
    return Curated(
        np.array([path not in found for path in paths]),
        [str(repaired) if path == first else path for path in paths],
    )


def parts_arguments(parts):
    return {
        "name": "parts", "root": str(parts), "normal_dir": "train/good", "normal_test_dir": "test/good",
        "abnormal_dir": "test/blob",
    }  # fmt: skip


def configured(parts, **changes):
    content = {
        "models": MODELS,
        "data": {
            "parts": {
                "class_path": "Folder", "init_args": parts_arguments(parts), "image_size": [64, 64], "train_images": 20
            }
        },
        "contamination": [0.0, 0.2],
        "seeds": [0],
    }  # fmt: skip
    path = parts / "bench.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return BenchConfig.read(path)


def cells(config, table, curator=oracle, **settings):
    return list(run(config, table.path, curator=curator, **settings))


def test_resuming_repeats_nothing_and_changes_nothing(parts, tmp_path, trained, few):
    config = configured(parts, contamination=[0.2])
    whole = ResultTable(tmp_path / "whole.csv")
    assert len(cells(config, whole)) == 2 * 3
    at_once = list(trained)
    trained.clear()

    table = ResultTable(tmp_path / "resumed.csv")
    steps = run(config, table.path, curator=oracle)
    for _ in range(5):  # in the middle of a model's three trainings
        next(steps)
    steps.close()
    table.path.write_bytes(table.path.read_bytes()[:-7])  # and of a row
    cells(config, ResultTable(table.path))

    pd.testing.assert_frame_equal(read_results(table.path)[FOUND], read_results(whole.path)[FOUND])
    assert len(trained) == len(at_once) + 1  # the row that was cut
    before = table.path.read_bytes()
    assert cells(config, ResultTable(table.path)) == []
    assert table.path.read_bytes() == before


def test_what_a_row_says(parts, tmp_path, trained, few):
    found = cells(configured(parts), ResultTable(tmp_path / "table.csv"))
    rows = {(r.contamination, r.training): r for r in found if r.model == "DFM"}
    raw, curated, clean = (rows[0.2, name] for name in ("raw", "curated", "clean"))
    assert (raw.kept, raw.rejected, raw.recall) == (20, 0, 0.0)
    assert math.isnan(raw.precision)
    assert (curated.kept, curated.rejected, curated.precision, curated.recall) == (17, 3, 1.0, 0.75)
    assert (clean.kept, clean.rejected, clean.precision, clean.recall) == (16, 4, 1.0, 1.0)
    assert (raw.test_normal, raw.test_abnormal) == (8, 4)
    assert curated.curation_seconds >= 0
    assert math.isnan(raw.curation_seconds)
    assert "anomalib 2" in raw.versions
    assert "cores" in raw.machine
    assert '"Dfm"' in raw.settings
    for row in found:
        assert 0 <= row.image_AUROC <= 1
        assert min(row.fit_seconds, row.test_seconds, row.images_per_second, row.model_mb) > 0
        assert math.isnan(row.pixel_AUROC)  # no masks
        assert row.reason == ""


def test_equal_training_sets_are_trained_on_once(parts, tmp_path, trained, few):
    rows = cells(configured(parts), ResultTable(tmp_path / "table.csv"))
    undirtied = [r for r in rows if r.contamination == 0 and r.model == "PaDiM"]
    assert [r.training for r in undirtied] == ["raw", "curated", "clean"]
    assert len({r.image_AUROC for r in undirtied}) == 1
    # of each model one training without dirt, three with
    assert len(trained) == 2 * (1 + 3)


def test_curation_runs_once_per_training_set(parts, tmp_path, trained, few):
    asked = []

    def curator(paths, seed, data, config, folder):
        asked.append((len(paths), seed, data.image_size))
        return oracle(paths, seed, data, config, folder)

    cells(configured(parts), ResultTable(tmp_path / "table.csv"), curator)
    assert asked == [(20, 0, (64, 64))] * 2


def test_a_model_that_refines_itself_says_what_it_left_out(parts, tmp_path, few):
    models = {"MetaRefine": {"init_args": {"rule": "share:0.2", "rounds": 1}, "trainings": ["raw", "clean"]}}
    config = configured(parts, models=models, contamination=[0.2])
    raw, clean = cells(config, ResultTable(tmp_path / "table.csv"))
    assert (raw.kept, raw.rejected) == (16, 4)
    assert raw.recall == raw.precision > 0  # as many are rejected as are dirty
    assert clean.rejected > 4  # the dirty ones, and what it rejects of the others
    assert clean.recall == 1


def test_a_contamination_that_cannot_be_had_is_a_row(parts, tmp_path, trained):
    config = configured(parts, contamination=[0.2, 0.9])
    rows = cells(config, ResultTable(tmp_path / "table.csv"))
    assert len(rows) == 2 * 2 * 3
    assert trained == []
    for row in rows:
        expected = "4 defective images are left to test on" if row.contamination == 0.2 else "needs 18 defective images"
        assert expected in row.reason
        assert math.isnan(row.image_AUROC)


def test_a_model_that_cannot_run_is_a_row_and_is_tried_again_when_asked(parts, tmp_path, trained, few):
    models = {"DFM": MODELS["DFM"] | {"init_args": {"layer": "blocks.99"}}, "PaDiM": MODELS["PaDiM"]}
    config = configured(parts, models=models, contamination=[0.0])
    table = ResultTable(tmp_path / "table.csv")
    rows = cells(config, table)
    assert [bool(row.reason) for row in rows] == [True] * 3 + [False] * 3
    assert "blocks.99" in rows[0].reason
    assert "\n" not in rows[0].reason
    assert cells(config, table) == []
    assert [row.model for row in cells(config, table, retry=True)] == ["DFM"] * 3


def test_a_data_set_that_cannot_be_had_leaves_no_rows(parts, tmp_path):
    config = configured(parts).at({"parts": str(tmp_path / "nowhere")})
    table = ResultTable(tmp_path / "table.csv")
    (said,) = cells(config, table)
    assert isinstance(said, LeftOut)
    assert said.data == "parts"
    assert "nowhere" in said.reason
    assert len(table) == 0


def test_a_clean_training_set_is_there_once_for_all_kinds_of_dirt(parts):
    config = configured(parts, protocols=["replace", "add"], overlaps=["overlap", "no-overlap"])
    dirts = [dirt for dirt, _ in plan(config, config.data[0])]
    assert sum(dirt.contamination == 0 for dirt in dirts) == 1
    assert len({(d.protocol, d.overlap) for d in dirts if d.contamination}) == 4


def test_another_protocol_reaches_the_training_set(parts, tmp_path, trained, few):
    config = configured(parts, contamination=[0.2], models={"DFM": MODELS["DFM"]}, protocols=["add"])
    raw, _, clean = cells(
        config, ResultTable(tmp_path / "table.csv"), lambda paths, *_: Curated(np.ones(len(paths), dtype=bool), paths)
    )
    assert raw.kept == 25
    assert (clean.kept, clean.rejected, clean.recall) == (20, 5, 1.0)
    assert raw.test_abnormal == 3


def test_repaired_images_are_trained_on(parts, tmp_path, monkeypatch, few):
    trained = {}
    train_and_test = training.train_and_test

    def logged(spec, backbone, layers, train, test, *rest):
        trained[len(trained)] = train.image_path.astype(str).tolist()
        return train_and_test(spec, backbone, layers, train, test, *rest)

    monkeypatch.setattr(training, "train_and_test", logged)
    models = {"DFM": MODELS["DFM"]}
    config = configured(parts, contamination=[0.2], models=models, trainings=["curated", "repaired"])
    curated, repaired = cells(config, ResultTable(tmp_path / "table.csv"))
    assert (repaired.training, repaired.kept, repaired.recall) == ("repaired", curated.kept, curated.recall)
    assert repaired.curation_seconds >= 0
    new = set(trained[1]) - set(trained[0])
    (old,) = set(trained[0]) - set(trained[1])
    assert [Path(path).name for path in new] == ["repaired.png"]
    assert "blob" in old
    assert not any(Path(path).exists() for path in new)  # they were temporary


def test_a_missing_row_of_the_clean_part_needs_no_curation(parts, tmp_path, trained, few):
    def never(*_arguments):
        pytest.fail("asked for a curation")

    table = tmp_path / "table.csv"
    for wanted, curator in (("curated", oracle), ("clean", never), ("raw", never)):
        config = configured(parts, contamination=[0.2], models={"DFM": MODELS["DFM"]}, trainings=[wanted])
        assert [row.reason for row in cells(config, ResultTable(table), curator)] == [""]
    assert len(trained) == 3


def test_without_anything_unusual_the_repaired_training_is_the_curated_one(parts, tmp_path, trained, few):
    def curator(paths, *arguments):
        return oracle(paths, *arguments)._replace(repaired=paths)

    config = configured(parts, contamination=[0.2], models={"DFM": MODELS["DFM"]}, trainings=["curated", "repaired"])
    curated, repaired = cells(config, ResultTable(tmp_path / "table.csv"), curator)
    assert len(trained) == 1
    assert repaired.image_AUROC == curated.image_AUROC


def test_the_curation_is_ours(monkeypatch, parts, tmp_path):
    """`curate` and `apply` themselves have their own tests."""
    asked = []
    manifest = SimpleNamespace(rejected=[parts / "test" / ".." / "test/blob/001.png"], root=parts)
    evidence = SimpleNamespace(unusual_in=["test/blob/002.png"])

    def curate(data, **settings):
        asked.append((data, settings))
        return manifest, evidence

    monkeypatch.setattr("anomalib_metarefine.curation.curate.curate", curate)
    applied = []
    monkeypatch.setattr(
        "anomalib_metarefine.curation.apply.apply", lambda *args, **kwargs: applied.append((args, kwargs))
    )
    config = configured(parts, backbone="resnet18", layers=["layer1"])
    paths = [str(parts / f"test/blob/{i:03d}.png") for i in range(3)]
    found = curated_images(paths, 5, config.data[0], config, tmp_path / "new")
    assert found.kept.tolist() == [True, False, True]
    assert found.repaired == [*paths[:2], str(tmp_path / "new/repaired/keep/test/blob/002.png")]
    ((data, settings),) = asked
    assert data == paths
    assert (settings["seed"], settings["image_size"]) == (5, (64, 64))
    assert (settings["backbone"], settings["layers"]) == ("resnet18", ("layer1",))
    assert applied == [((manifest, tmp_path / "new/repaired", "repair"), {"review": "keep", "evidence": evidence})]
    evidence.unusual_in.clear()
    assert curated_images(paths, 5, config.data[0], config, tmp_path / "new").repaired == paths
    assert len(applied) == 1
