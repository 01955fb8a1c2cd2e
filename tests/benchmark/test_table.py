import math
from dataclasses import asdict, replace

import pytest

from anomalib_metarefine.benchmark.table import KEY, ResultTable, Row

ROW = Row(
    data="parts", image_size="64x64", train_images=20, contamination=0.2, seed=0, model="Padim",
    settings="layers=['a', 'b'], n_features=20", training="curated", image_AUROC=0.9, kept=16, rejected=4,
    precision=float("nan"), recall=0.5, seconds=1.5, curation_seconds=2.0, test_normal=8, test_abnormal=4,
    versions="anomalib 2.7.0",
)  # fmt: skip


def key(row):
    return {name: asdict(row)[name] for name in KEY}


def test_rows_come_back_as_they_went_in(tmp_path):
    table = ResultTable(tmp_path / "table.csv")
    assert table.find(key(ROW)) is None
    table.append(ROW)
    found = ResultTable(tmp_path / "table.csv").find(key(ROW))
    assert math.isnan(found.precision)
    expected = {name: value for name, value in asdict(ROW).items() if name != "precision"}
    assert {name: found[name] for name in expected} == expected


def test_every_field_of_the_key_counts(tmp_path):
    table = ResultTable(tmp_path / "table.csv")
    table.append(ROW)
    others = {"data": "x", "image_size": "1x1", "train_images": 1, "contamination": 0.4, "seed": 1, "model": "Dfm",
              "settings": "", "training": "raw"}  # fmt: skip
    assert set(others) == set(KEY)
    for name, value in others.items():
        assert table.find(key(replace(ROW, **{name: value}))) is None, name


def test_a_row_cut_short_is_dropped(tmp_path):
    path = tmp_path / "table.csv"
    table = ResultTable(path)
    table.append(ROW)
    table.append(replace(ROW, seed=1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    reopened = ResultTable(path)
    assert reopened.read().seed.tolist() == [0]
    reopened.append(replace(ROW, seed=1))
    assert path.read_bytes() == whole


def test_two_writers_share_a_file(tmp_path):
    first, second = ResultTable(tmp_path / "table.csv"), ResultTable(tmp_path / "table.csv")
    first.append(ROW)
    second.append(replace(ROW, data="other"))
    assert first.read().data.tolist() == ["parts", "other"]


def test_a_table_of_something_else_is_not_touched(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\]"):
        ResultTable(path)
    assert path.read_text() == "a,b\n1,2\n"
