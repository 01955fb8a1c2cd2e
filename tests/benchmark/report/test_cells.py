import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.benchmark.report.cells import (
    CELL,
    REFINED,
    UNREFINED,
    Scenario,
    checked,
    common_cells,
    macro_average,
    model_order,
    scenarios,
    spell,
)
from anomalib_metarefine.benchmark.table import COLUMNS, KEY, label
from tests.benchmark.report.made_up import failed, results

SMALL = results(models=("DFM", "PaDiM"), shares=(0.0, 0.2), seeds=(0, 1))


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(len(SMALL))))
def test_the_order_of_rows_does_not_matter(order):
    pd.testing.assert_frame_equal(checked(SMALL.iloc[order]), checked(SMALL))


@pytest.mark.parametrize(
    ("column", "one", "other"),
    [
        ("settings", "depth=1", "depth=2"),
        ("backbone", "resnet18", "resnet50"),
        ("image_size", "256x256", "512x512"),
        ("train_images", 200, 100),
    ],
)
def test_one_cell_in_two_ways_is_refused(column, one, other):
    rows = pd.concat([SMALL.assign(**{column: one}), SMALL[SMALL.model == "PaDiM"].assign(**{column: other})])
    with pytest.raises(ValueError, match=f"^flat.* more than one {column}: {min(one, other)} and {max(one, other)}"):
        checked(rows)


def test_other_settings_on_another_seed_are_refused_too():
    rows = SMALL.assign(settings=np.where((SMALL.seed == 1) & (SMALL.model == "DFM"), "depth=2", "depth=1"))
    with pytest.raises(ValueError, match="DFM is in the results with more than one settings"):
        checked(rows)


def test_what_failed_with_other_settings_may_be_tried_again():
    first = failed(SMALL, "no network", model="PaDiM").assign(settings="teacher=none")
    again = checked(pd.concat([first[first.model == "PaDiM"], SMALL]))
    pd.testing.assert_frame_equal(again, checked(SMALL))


def test_of_one_cell_the_latest_row_that_ran():
    old, new = SMALL.assign(date="2031-01-01", image_AUROC=0.1), SMALL.assign(date="2031-01-02", image_AUROC=0.2)
    broken = SMALL.assign(date="2031-01-03", reason="out of memory")
    for files in ([old, new, broken], [broken, new, old]):
        assert checked(pd.concat(files)).image_AUROC.eq(0.2).all()


def test_rows_as_pandas_reads_them(tmp_path):
    failed(SMALL, "no", model="DFM").to_csv(tmp_path / "rows.csv", index=False)
    rows = checked(pd.read_csv(tmp_path / "rows.csv"))
    assert (rows.category == "").any()
    assert set(rows.reason) == {"", "no"}
    assert rows[rows.reason == "no"][["image_AUROC", "kept", "fit_seconds"]].isna().all(axis=None)


def test_no_results():
    with pytest.raises(ValueError, match="no results yet"):
        checked(SMALL.iloc[:0])
    with pytest.raises(ValueError, match="columns seed, reason are missing"):
        checked(SMALL.drop(columns=["seed", "reason"]))


def test_clean_training_sets_belong_to_every_kind_of_dirt():
    added = results(models=("DFM", "PaDiM"), shares=(0.2,), seeds=(0, 1), protocol="add")
    parts = scenarios(checked(pd.concat([SMALL, added])))
    assert [one.protocol for one in parts] == ["add", "replace"]
    for part in parts.values():
        assert len(part) == len(SMALL)
        assert part[part.contamination > 0].protocol.nunique() == 1
        assert not part.duplicated(KEY).any()


def test_its_own_clean_rows_come_first():
    added = results(models=("DFM", "PaDiM"), shares=(0.0, 0.2), seeds=(0, 1), protocol="add")
    parts = scenarios(checked(pd.concat([SMALL.assign(image_AUROC=0.9), added.assign(image_AUROC=0.8)])))
    assert {one.protocol: set(part.image_AUROC) for one, part in parts.items()} == {"replace": {0.9}, "add": {0.8}}


def test_a_clean_benchmark_has_one_scenario():
    assert list(scenarios(checked(SMALL[SMALL.contamination == 0]))) == [Scenario("replace", "no-overlap")]


def test_names():
    assert model_order(["PaDiM", "cflow", UNREFINED, REFINED, "PaDiM"]) == [REFINED, UNREFINED, "cflow", "PaDiM"]
    assert (label("parts", ""), label("parts", "bolt"), label("screw", "screw")) == ("parts", "parts/bolt", "screw")
    assert Scenario("add", "overlap").slug == "add-overlap"
    assert "added to the good ones; they are in the test set, too" in str(Scenario("add", "overlap"))


def grid(values):
    """``values``: (data, category, seed, model) -> figure."""
    return pd.DataFrame([(*key, value) for key, value in values.items()], columns=[*CELL, "model", "figure"])


def test_every_data_set_counts_the_same():
    values = {("a", c, 0, "m"): v for c, v in zip("xyz", [0.1, 0.2, 0.3], strict=True)} | {("b", "", 0, "m"): 0.8}
    assert macro_average(common_cells(grid(values), "figure", ["model"])).mean["m"] == pytest.approx(0.5)


def test_spread_is_that_of_whole_averages():
    values = {("a", "", 0, "m"): 0.1, ("b", "", 0, "m"): 0.3, ("a", "", 1, "m"): 0.3, ("b", "", 1, "m"): 0.5}
    average = macro_average(common_cells(grid(values), "figure", ["model"]))
    assert (average.seeds, average.sd["m"]) == (2, pytest.approx(0.2 / math.sqrt(2)))
    del values["b", "", 1, "m"]  # seed 1 is no average of both data sets any more
    average = macro_average(common_cells(grid(values), "figure", ["model"]))
    assert average.seeds == 1
    assert math.isnan(average.sd["m"])
    assert average.mean["m"] == pytest.approx((0.2 + 0.3) / 2)


CELLS = [
    (data, category, seed) for data, category in [("a", "x"), ("a", "y"), ("b", ""), ("c", "")] for seed in (0, 1, 2)
]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.4, 1), min_size=len(CELLS), max_size=len(CELLS)),
    st.sets(st.sampled_from(CELLS)),
    st.sets(st.sampled_from(CELLS)),
)
def test_equal_models_have_equal_averages_whatever_they_could_not_run(figures, missing, also_missing):
    values = {}
    for cell, figure in zip(CELLS, figures, strict=True):
        values[(*cell, "one")] = math.nan if cell in missing else figure
        values[(*cell, "other")] = math.nan if cell in also_missing else figure
    wide = common_cells(grid(values), "figure", ["model"])
    have = [cell for cell in CELLS if cell not in missing | also_missing]
    if len(missing) == len(CELLS) or len(also_missing) == len(CELLS):
        assert len(wide.columns) < 2  # nothing to compare with
        return
    assert sorted(wide.index) == sorted(have)
    average = macro_average(wide)
    if have:
        assert average.mean["one"] == average.mean["other"]
        of = dict(zip(CELLS, figures, strict=True))
        by_data = []
        for data in {cell[0] for cell in have}:
            categories = {cell[1] for cell in have if cell[0] == data}
            by_data.append(
                np.mean([np.mean([of[c] for c in have if c[:2] == (data, category)]) for category in categories])
            )
        assert average.mean["one"] == pytest.approx(np.mean(by_data))


def test_cells_in_words():
    index = pd.MultiIndex.from_tuples([("a", "x", 0), ("a", "y", 0), ("b", "", 0), ("b", "", 1)], names=CELL)
    text = spell(pd.DataFrame({"m": 0.5}, index))
    assert text == "a (2 categories), b; seeds 0, 1, not all everywhere"
    assert spell(pd.DataFrame({"m": 0.5}, index[:1])) == "a/x; seeds 0"


def test_made_up_rows_have_the_columns_of_the_benchmark():
    assert SMALL.columns.tolist() == COLUMNS
