import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from anomalib_metarefine.benchmark import others, training
from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.benchmark.table import KEY, ResultTable, Row
from anomalib_metarefine.benchmark.transfer import curated_mask, main, run


@pytest.fixture
def trained(monkeypatch):
    """Every training, in order, as (model, images, seed)."""
    log = []
    train_and_test = training.train_and_test

    def logged(name, train, *args):
        log.append((name, len(train), args[2]))
        return train_and_test(name, train, *args)

    monkeypatch.setattr(training, "train_and_test", logged)
    recipe = others.RECIPES["Padim"]
    monkeypatch.setitem(
        others.RECIPES, "Padim", others.Recipe(recipe.model, recipe.arguments | {"n_features": 10}, batch_size=8)
    )
    return log


@pytest.fixture
def few(monkeypatch):
    """The fixture has eight defective images."""
    monkeypatch.setattr("anomalib_metarefine.benchmark.transfer._LEAST_DEFECTIVE", 2)


def oracle(paths, seed, image_size):
    """A curation that finds all defects but one."""
    found = [path for path in paths if "blob" in path][1:]
    return np.array([path not in found for path in paths])


def everything(table, parts, curator=oracle, seeds=(0,)):
    data = [DataSet.parse(f"{parts}@64x64:20:parts")]
    return run(table, data, [0.0, 0.2], seeds, ["Padim", "Dfm"], curator)


def test_resuming_repeats_nothing_and_changes_nothing(parts, tmp_path, trained, few):
    whole = ResultTable(tmp_path / "whole.csv")
    rows = list(everything(whole, parts, seeds=(0, 1)))
    assert len(rows) == 2 * 2 * 2 * 3
    at_once = list(trained)
    trained.clear()

    table = ResultTable(tmp_path / "resumed.csv")
    steps = everything(table, parts, seeds=(0, 1))
    for _ in range(5):  # in the middle of a model's three trainings
        next(steps)
    steps.close()
    content = table.path.read_bytes()
    table.path.write_bytes(content[:-7])  # and of a row
    list(everything(ResultTable(table.path), parts, seeds=(0, 1)))

    columns = [*KEY, "image_AUROC", "kept", "rejected", "precision", "recall", "test_normal", "test_abnormal"]
    pd.testing.assert_frame_equal(table.read()[columns], whole.read()[columns])
    assert len(trained) == len(at_once)
    before = table.path.read_bytes()
    assert list(everything(ResultTable(table.path), parts, seeds=(0, 1))) == []
    assert table.path.read_bytes() == before


def test_what_a_row_says(parts, tmp_path, trained, few):
    table = ResultTable(tmp_path / "table.csv")
    rows = {(r.contamination, r.training): r for r in everything(table, parts) if r.model == "Dfm"}
    raw, curated, clean = (rows[0.2, name] for name in ("raw", "curated", "clean"))
    assert (raw.kept, raw.rejected, raw.recall) == (20, 0, 0.0)
    assert math.isnan(raw.precision)
    assert (curated.kept, curated.rejected, curated.precision, curated.recall) == (17, 3, 1.0, 0.75)
    assert (clean.kept, clean.rejected, clean.precision, clean.recall) == (16, 4, 1.0, 1.0)
    assert (raw.test_normal, raw.test_abnormal) == (8, 4)
    assert curated.curation_seconds >= 0
    assert math.isnan(raw.curation_seconds)
    assert "anomalib 2" in raw.versions
    assert "layer=blocks.4" in raw.settings


def test_equal_training_sets_are_trained_on_once(parts, tmp_path, trained, few):
    rows = list(everything(ResultTable(tmp_path / "table.csv"), parts))
    undirtied = [r for r in rows if r.contamination == 0 and r.model == "Padim"]
    assert [r.training for r in undirtied] == ["raw", "curated", "clean"]
    assert len({r.image_AUROC for r in undirtied}) == 1
    # of each model one training without dirt, three with
    assert len(trained) == 2 * (1 + 3)


def test_curation_runs_once_per_training_set(parts, tmp_path, trained, few):
    asked = []

    def curator(paths, seed, image_size):
        asked.append((len(paths), seed, image_size))
        return oracle(paths, seed, image_size)

    list(everything(ResultTable(tmp_path / "table.csv"), parts, curator))
    assert asked == [(20, 0, (64, 64))] * 2


def test_a_cell_that_cannot_be_had_is_named_and_the_others_run(parts, tmp_path, trained):
    data = [DataSet.parse(f"{parts}@64x64:20:parts")]
    (said,) = run(ResultTable(tmp_path / "table.csv"), data, [0.2], [0], ["Dfm"], oracle)
    assert "parts, contamination 0.2, seed 0 left out" in said
    assert "4 defective images left to test on" in said
    assert trained == []


def test_the_curation_is_ours(monkeypatch, parts):
    """`curate` itself has its own tests."""
    asked = []

    def curate(data, **settings):
        asked.append((data, settings))
        manifest = SimpleNamespace(rejected=[parts / "test" / ".." / "test/blob/001.png"], review=[data[0]])
        return SimpleNamespace(manifest=manifest)

    monkeypatch.setitem(sys.modules, "anomalib_metarefine.curation.curate", SimpleNamespace(curate=curate))
    paths = [str(parts / f"test/blob/{i:03d}.png") for i in range(3)]
    assert curated_mask(paths, 5, (64, 96)).tolist() == [True, False, True]
    ((data, settings),) = asked
    assert data == paths
    assert (settings["seed"], settings["image_size"]) == (5, (64, 96))


def test_data_sets_by_text(parts):
    assert DataSet.parse("elpv-poly") == DataSet("elpv-poly", "elpv-poly", (256, 256), 300)
    named = DataSet.parse(f"{parts}@160x400:120:belt")
    assert named == DataSet("belt", str(parts), (160, 400), 120)
    assert DataSet.parse(str(parts)) == DataSet(parts.name, str(parts), (256, 256), None)
    assert DataSet.parse(f"{parts}:12").train_images == 12
    datamodule = named.datamodule(seed=0)
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (24, 16)


def test_bad_input_is_one_line_and_exit_code_2(parts, tmp_path, capsys):
    out = str(tmp_path / "table.csv")
    assert main(["--out", out, "--data", str(parts / "train")]) == 2
    assert "has no folder train/good" in capsys.readouterr().err
    assert main(["--out", out, "--data", str(parts), str(parts)]) == 2
    assert "different names" in capsys.readouterr().err
    assert main(["--out", out, "--summary"]) == 2
    assert "no table" in capsys.readouterr().err


def test_summary_of_a_table(parts, tmp_path, trained, few, capsys):
    table = ResultTable(tmp_path / "table.csv")
    assert all(isinstance(row, Row) for row in everything(table, parts))
    assert main(["--out", str(table.path), "--summary"]) == 0
    assert "| Padim | parts | 20% | 1 |" in capsys.readouterr().out
