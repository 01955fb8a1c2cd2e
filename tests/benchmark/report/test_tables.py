import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.benchmark.report.cells import checked, macro_average, scenarios
from anomalib_metarefine.benchmark.report.costs import costs
from anomalib_metarefine.benchmark.report.gains import gains
from anomalib_metarefine.benchmark.report.published import published_table, read_published
from anomalib_metarefine.benchmark.report.tables import (
    IMAGE_AUROC,
    LOST_TO_CLEAN,
    LOST_TO_ZERO,
    PIXEL,
    comparison,
    comparisons,
    losses,
)
from anomalib_metarefine.benchmark.report.typeset import Cell
from tests.benchmark.report.made_up import DATA, MODELS, failed, results

ROWS = results(models=MODELS[:4], shares=(0.0, 0.2), seeds=(0, 1))


def one_scenario(rows):
    (part,) = scenarios(checked(rows)).values()
    return part


def texts(table):
    """(data, dirty) -> texts of the models' cells."""
    plain = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows]
    return {(row[0], row[1]): row[2:] for row in plain}


def row(table, data, dirty):
    (found,) = [cells for cells in table.rows if (getattr(cells[0], "text", cells[0]), cells[1]) == (data, dirty)]
    return found


def figures(values):
    """``values``: (data, category, contamination, seed, model, training) -> image AUROC; there are no other rows."""
    rows = []
    for (data, category, contamination, seed, model, training), auroc in values.items():
        made = results(models=(model,), data=((data, category),), shares=(contamination,), seeds=(seed,))
        rows.append(made[made.training == training].assign(image_AUROC=auroc))
    return one_scenario(pd.concat(rows))


def test_mean_spread_and_the_best():
    rows = figures({("a", "", 0.2, 0, "one", "raw"): 0.9, ("a", "", 0.2, 1, "one", "raw"): 0.8,
                    ("a", "", 0.2, 0, "two", "raw"): 0.7, ("a", "", 0.2, 1, "two", "raw"): 0.7})  # fmt: skip
    table = comparison(rows, IMAGE_AUROC, "raw")
    assert table.header == ["data", "dirty", "one", "two"]
    assert table.rows == [["a", "20 %", Cell("85.0 ± 7.1", bold=True), Cell("70.0 ± 0.0")]]
    assert "over 2 seeds" in table.text


def test_the_number_of_seeds_is_shown_where_there_are_fewer():
    rows = figures({("a", "", 0.2, 0, "one", "raw"): 0.9, ("a", "", 0.2, 1, "one", "raw"): 0.8,
                    ("a", "", 0.2, 0, "two", "raw"): 0.9, ("a", "", 0.0, 0, "one", "raw"): 0.9})  # fmt: skip
    assert texts(comparison(rows, IMAGE_AUROC, "raw")) == {
        ("a", "0 %"): ["90.0 (1)", ""],  # nothing to compare with, and not run yet
        ("a", "20 %"): ["85.0 ± 7.1", "90.0 (1)"],
    }
    # Seed 1 may be the harder one: a mean over seed 0 alone is not the better for it.
    assert not any(cell.bold for line in comparison(rows, IMAGE_AUROC, "raw").rows for cell in line[2:] if cell != "")


def test_what_could_not_be_run_does_not_vanish():
    rows = one_scenario(failed(failed(ROWS, "too few", data="flat", contamination=0.2), "no network", model="DFM"))
    for training in ("raw", "curated", "clean"):
        table = comparison(rows, IMAGE_AUROC, training)
        assert [cell.note for cell in row(table, "flat", "20 %")[2:]] == ["too few", "too few", "no network", "too few"]
        assert [cell.text for cell in row(table, "flat", "20 %")[2:]] == ["-"] * 4
        assert row(table, "made-up-belts", "0 %")[4] == Cell("-", note="no network")
        assert row(table, "average of data sets", "20 %")[4].text == "-"


def test_a_data_set_that_could_not_be_run_at_all_is_there():
    rows = one_scenario(failed(ROWS, "broken", data="flat"))
    assert row(comparison(rows, IMAGE_AUROC, "raw"), "flat", "0 %")[2] == Cell("-", note="broken")


def test_pixel_metrics_only_where_there_are_masks():
    tables = comparisons(one_scenario(ROWS), PIXEL)
    assert len(tables) == 2 * 3  # two of the metrics are made up, for every training
    assert {data for data, _ in texts(tables[0])} == {
        "made-up-parts/bolt",
        "made-up-parts/nut",
        "made-up-parts, average",
    }


def test_a_figure_that_a_model_does_not_give():
    rows = ROWS.assign(pixel_AUROC=ROWS.pixel_AUROC.where(ROWS.model != "DFM"))
    cell = row(comparison(one_scenario(rows), PIXEL[0], "raw"), "made-up-parts/nut", "20 %")[4]
    assert cell == Cell("-", note="It ran, and gives no such figure.")


def test_averages_are_over_cells_that_all_models_have():
    rows = failed(ROWS, "too few", data="flat", model="DFM", contamination=0.2)
    table = comparison(one_scenario(rows), IMAGE_AUROC, "raw")
    name, _, *cells = row(table, "average of data sets", "20 %")
    assert name.note == (
        "Over made-up-belts, made-up-cells, made-up-parts (2 categories); seeds 0, 1. Left out, as some model has no "
        "figure: flat."
    )
    used = rows[(rows.contamination == 0.2) & (rows.training == "raw") & (rows.data != "flat")]
    for model, cell in zip(table.header[2:], cells, strict=True):
        wide = used[used.model == model].set_index(["data", "category", "seed"])[["image_AUROC"]]
        assert cell.text.split()[0] == f"{100 * macro_average(wide).mean.image_AUROC:.1f}"
    assert "flat" in row(table, "average of data sets", "0 %")[0].note.split("Left out")[0]


def test_categories_can_be_left_to_their_average():
    table = comparison(one_scenario(ROWS), IMAGE_AUROC, "raw", categories=False)
    names = {data for data, _ in texts(table)}
    assert names == {"flat", "made-up-belts", "made-up-cells", "made-up-parts, average", "average of data sets"}


FEW = failed(results(models=MODELS[:3], data=DATA[1:4], shares=(0.0, 0.2), seeds=(0, 1)), "no", seed=1, model="DFM")


def all_tables(rows):
    part = one_scenario(rows)
    lost = comparison(losses(part, LOST_TO_ZERO), LOST_TO_ZERO, "raw")
    return [comparison(part, IMAGE_AUROC, "raw"), lost, *gains(part), *costs(part)]


IN_ORDER = all_tables(FEW)


@settings(deadline=None, max_examples=5)
@given(st.permutations(range(len(FEW))))
def test_tables_do_not_depend_on_the_order_of_rows(order):
    assert all_tables(FEW.iloc[order]) == IN_ORDER


LOST = {
    ("a", "", 0.0, 0, "one", "raw"): 0.95,
    ("a", "", 0.0, 0, "one", "curated"): 0.94,
    ("a", "", 0.0, 0, "one", "clean"): 0.96,
    ("a", "", 0.2, 0, "one", "raw"): 0.80,
    ("a", "", 0.2, 0, "one", "curated"): 0.88,
    ("a", "", 0.2, 0, "one", "clean"): 0.90,
}


@pytest.mark.parametrize(
    ("metric", "raw", "curated", "at_zero"),
    [(LOST_TO_CLEAN, "10.0", "2.0", "2.0"), (LOST_TO_ZERO, "15.0", "7.0", "1.0")],
)
def test_points_lost(metric, raw, curated, at_zero):
    rows = losses(figures(LOST), metric)
    assert texts(comparison(rows, metric, "raw")) == {("a", "20 %"): [raw]}
    # Curation can cost something where there is nothing to find.
    assert texts(comparison(rows, metric, "curated")) == {("a", "0 %"): [at_zero], ("a", "20 %"): [curated]}


def test_nothing_is_lost_to_what_was_not_measured():
    without = {key: value for key, value in LOST.items() if key[-1] != "clean"}
    assert losses(figures(without), LOST_TO_CLEAN).empty
    rows = figures(LOST)
    rows.loc[rows.training == "clean", ["image_AUROC", "reason"]] = [math.nan, "all dirty"]
    assert row(comparison(losses(rows, LOST_TO_CLEAN), LOST_TO_CLEAN, "raw"), "a", "20 %")[2].note == "all dirty"


def test_the_smallest_loss_is_the_best():
    table = comparison(losses(one_scenario(ROWS), LOST_TO_ZERO), LOST_TO_ZERO, "raw")
    cells = row(table, "average of data sets", "20 %")[2:]
    assert [cell.bold for cell in cells] == [True, False, False, False]
    assert float(cells[0].text.split()[0]) == min(float(cell.text.split()[0]) for cell in cells)


def test_costs_are_told_apart_by_machine():
    slow = results(models=("PaDiM", "DFM"), data=DATA[:1], seeds=(7,), machine="slow", fit_seconds=100.0, jobs=2)
    fast = results(models=("PaDiM", "DFM"), data=DATA[:1], machine="fast", fit_seconds=1.0)
    fast["fit_seconds"] *= fast.model.map({"PaDiM": 1, "DFM": 4})
    tables = costs(one_scenario(pd.concat([slow, fast])))
    assert [table.title for table in tables] == ["Cost on fast", "Cost on slow, shared by 2 processes"]
    by_model = {cells[1]: cells for cells in tables[0].rows}
    # 4 shares and 3 seeds; training is 4 + 5 against 1 + 5 seconds
    assert by_model["DFM"][2:5] == ["12", "4", "5"]
    assert by_model["DFM"][7:9] == ["1.5", "0.5"]
    assert by_model["PaDiM"][7:9] == ["1", "1"]


def test_ratios_are_over_cells_that_both_have():
    rows = results(models=("PaDiM", "DFM"), data=DATA[:1])
    rows["fit_seconds"] = 10.0 * (1 + rows.seed)
    rows = rows[~((rows.model == "DFM") & (rows.seed < 2))].assign(feature_seconds=math.nan)
    (table,) = costs(one_scenario(rows))
    assert {cells[1]: (cells[3], cells[4], cells[7]) for cells in table.rows} == {
        "PaDiM": ("20", "-", "1"),
        "DFM": ("30", "-", "1"),
    }


def test_published_figures_are_these():
    found = [
        (one["method"], one["data_set"], one["contamination"], one["value"]) for one in read_published()["figures"]
    ]  # fmt: skip
    assert found == [
        ("RAD", "mvtec_ad", 0, 95.4), ("RAD", "mvtec_ad", 0.5, 86.8), ("RAD", "ksdd2", 0, 94.6),
        ("RAD", "ksdd2", 0.5, 92.1), ("SoftPatch", "mvtec_ad", 0.1, 98.65), ("InReaCh", "mvtec_ad", None, 92.3),
        ("MeDS", "mvtec_ad", 0.4, 99.16),
    ]  # fmt: skip


def test_ours_beside_published_figures():
    categories = [("mvtec_ad", str(number)) for number in range(15)]
    whole = results(models=("MetaRefine", "SoftPatch"), data=categories, shares=(0.1,), seeds=(0,), image_AUROC=0.9)
    some = results(models=("MetaRefine",), data=categories[:2], shares=(0.4,), seeds=(0,), image_AUROC=0.8)
    ((scenario, part),) = scenarios(checked(pd.concat([whole, some]))).items()
    rows = {(cells[0], cells[2], cells[3]): cells[6:] for cells in published_table(part, scenario).rows}
    assert rows["SoftPatch", "MVTec AD", "10 %"] == [
        Cell("98.65"), Cell("90.0"), Cell("90.0", note="Over mvtec_ad (15 categories); seeds 0."),
    ]  # fmt: skip
    _, other, ours = rows["MeDS", "MVTec AD", "40 %"]
    assert (other.text, ours.text) == ("", "80.0")
    assert ours.note == "Over mvtec_ad (2 categories); seeds 0. Of 15 categories, so not comparable."
    command = "To be filled by: metarefine bench configs/bench/ksdd2.yaml --root ksdd2=DIR"
    assert rows["RAD", "KolektorSDD2", "0 %"][1:] == [Cell(""), Cell("", note=command)]
    assert rows["InReaCh", "MVTec AD", ""][1].text == ""
