import math
from dataclasses import asdict, replace

import pandas as pd
import pytest

from anomalib_metarefine.benchmark.table import COLUMNS, KEY, ResultTable, Row, read_results

ROW = Row(
    data="parts", category="", image_size="64x64", train_images=20, backbone="tf_efficientnet_lite0",
    protocol="replace", overlap="no-overlap", contamination=0.2, seed=0, model="PaDiM, small",
    settings='{"layers": ["a", "b"]}', training="curated", image_AUROC=0.9, kept=16, rejected=4, recall=0.5,
    fit_seconds=1.5, test_normal=8, test_abnormal=4, versions="anomalib 2.7.0",
)  # fmt: skip


def same(left: Row, right: Row) -> bool:
    return pd.DataFrame([asdict(left)]).equals(pd.DataFrame([asdict(right)]))  # NaN equals NaN here


def test_rows_come_back_as_they_went_in(tmp_path):
    table = ResultTable(tmp_path / "table.csv")
    assert table.find(ROW.key) is None
    table.append(ROW)
    assert same(table.find(ROW.key), ROW)
    found = ResultTable(tmp_path / "table.csv").find(ROW.key)
    assert same(found, ROW)
    assert math.isnan(found.precision)
    frame = read_results(tmp_path / "table.csv")
    assert frame.columns.tolist() == COLUMNS
    assert same(Row(**frame.iloc[0].to_dict()), ROW)


@pytest.mark.parametrize("name", KEY)
def test_every_field_of_the_key_counts(tmp_path, name):
    table = ResultTable(tmp_path / "table.csv")
    table.append(ROW)
    value = getattr(ROW, name)
    assert table.find(replace(ROW, **{name: value + ("x" if isinstance(value, str) else 1)}).key) is None


def test_the_last_row_of_a_key_counts(tmp_path):
    table = ResultTable(tmp_path / "table.csv")
    table.append(replace(ROW, reason="no network", image_AUROC=float("nan")))
    table.append(ROW)
    assert len(table) == 1
    assert ResultTable(table.path).find(ROW.key).reason == ""
    assert read_results(table.path).image_AUROC.tolist() == [0.9]


def test_a_row_cut_short_is_dropped(tmp_path):
    path = tmp_path / "table.csv"
    table = ResultTable(path)
    table.append(ROW)
    table.append(replace(ROW, seed=1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    reopened = ResultTable(path)
    assert read_results(path).seed.tolist() == [0]
    assert reopened.find(replace(ROW, seed=1).key) is None
    reopened.append(replace(ROW, seed=1))
    assert path.read_bytes() == whole


def test_two_writers_share_a_file(tmp_path):
    first, second = ResultTable(tmp_path / "table.csv"), ResultTable(tmp_path / "table.csv")
    first.append(ROW)
    second.append(replace(ROW, data="other"))
    assert read_results(first.path).data.tolist() == ["parts", "other"]


def test_several_files_are_one_table(tmp_path):
    for name, seed in [("a.csv", 0), ("b.csv", 1)]:
        ResultTable(tmp_path / name).append(replace(ROW, seed=seed))
    assert read_results(tmp_path / "a.csv", tmp_path / "b.csv").seed.tolist() == [0, 1]
    with pytest.raises(FileNotFoundError, match=r"c\.csv.*metarefine bench"):
        read_results(tmp_path / "a.csv", tmp_path / "c.csv")


def test_a_table_of_something_else_is_not_touched(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\]"):
        ResultTable(path)
    with pytest.raises(ValueError, match="no benchmark result"):
        read_results(path)
    assert path.read_text() == "a,b\n1,2\n"
