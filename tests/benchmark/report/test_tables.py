import math

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.benchmark.report.cells import checked, macro_average, scenarios
from anomalib_metarefine.benchmark.report.tables import IMAGE_AUROC, PIXEL, comparison, comparisons, costs, gains
from tests.benchmark.report.made_up import DATA, MODELS, failed, results

ROWS = results(models=MODELS[:4], shares=(0.0, 0.2), seeds=(0, 1))


def one_scenario(rows):
    (part,) = scenarios(checked(rows)).values()
    return part


def texts(table):
    """(data, dirty) -> texts of the models, without the numbers of footnotes."""
    plain = [{name: text.partition(" [")[0] for name, text in line.items()} for line in table.lines]
    return {(line.pop("data"), line.pop("dirty")): list(line.values()) for line in plain}


def row(table, data, dirty):
    (found,) = [line for line in table.lines if (line["data"].partition(" [")[0], line["dirty"]) == (data, dirty)]
    return found


def note(table, text):
    """The footnote that a text leads to."""
    return {f"[{number}]": note for note, number in table.notes.items()}[text.split(" ")[-1]]


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
    assert table.lines == [{"data": "a", "dirty": "20 %", "one": "85.0 ± 7.1", "two": "70.0 ± 0.0"}]
    assert table.best == [{"one"}]
    assert "over 2 seeds" in table.text


def test_the_number_of_seeds_is_shown_where_there_are_fewer():
    rows = figures({("a", "", 0.2, 0, "one", "raw"): 0.9, ("a", "", 0.2, 1, "one", "raw"): 0.8,
                    ("a", "", 0.2, 0, "two", "raw"): 0.9, ("a", "", 0.0, 0, "one", "raw"): 0.9})  # fmt: skip
    assert texts(comparison(rows, IMAGE_AUROC, "raw")) == {
        ("a", "0 %"): ["90.0 (1)", ""],  # nothing to compare with, and not run yet
        ("a", "20 %"): ["85.0 ± 7.1", "90.0 (1)"],
    }
    # Seed 1 may be the harder one: a mean over seed 0 alone is not the better for it.
    assert not any(comparison(rows, IMAGE_AUROC, "raw").best)


def test_what_could_not_be_run_does_not_vanish():
    rows = one_scenario(failed(failed(ROWS, "too few", data="flat", contamination=0.2), "no network", model="DFM"))
    for training in ("raw", "curated", "clean"):
        table = comparison(rows, IMAGE_AUROC, training)
        flat = [text for name, text in row(table, "flat", "20 %").items() if name in MODELS]
        assert [note(table, text) for text in flat] == ["too few", "too few", "no network", "too few"]
        assert all(text.startswith("- ") for text in flat)
        assert note(table, row(table, "made-up-belts", "0 %")["DFM"]) == "no network"
        assert row(table, "average of data sets", "20 %")["DFM"].startswith("-")


def test_a_data_set_that_could_not_be_run_at_all_is_there():
    rows = one_scenario(failed(ROWS, "broken", data="flat"))
    table = comparison(rows, IMAGE_AUROC, "raw")
    assert note(table, row(table, "flat", "0 %")["DFM"]) == "broken"


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
    table = comparison(one_scenario(rows), PIXEL[0], "raw")
    assert note(table, row(table, "made-up-parts/nut", "20 %")["DFM"]) == "It ran, and gives no such figure."


def test_averages_are_over_cells_that_all_models_have():
    rows = failed(ROWS, "too few", data="flat", model="DFM", contamination=0.2)
    table = comparison(one_scenario(rows), IMAGE_AUROC, "raw")
    line = row(table, "average of data sets", "20 %")
    assert note(table, line["data"]) == (
        "Over made-up-belts, made-up-cells, made-up-parts (2 categories); seeds 0, 1. Left out, as some model has no "
        "figure: flat."
    )
    used = rows[(rows.contamination == 0.2) & (rows.training == "raw") & (rows.data != "flat")]
    for model in MODELS[:4]:
        wide = used[used.model == model].set_index(["data", "category", "seed"])[["image_AUROC"]]
        assert line[model].split()[0] == f"{100 * macro_average(wide).mean.image_AUROC:.1f}"
    assert "flat" in note(table, row(table, "average of data sets", "0 %")["data"]).split("Left out")[0]


def test_categories_can_be_left_to_their_average():
    table = comparison(one_scenario(ROWS), IMAGE_AUROC, "raw", categories=False)
    names = {data for data, _ in texts(table)}
    assert names == {"flat", "made-up-belts", "made-up-cells", "made-up-parts, average", "average of data sets"}


FEW = failed(results(models=MODELS[:3], data=DATA[1:4], shares=(0.0, 0.2), seeds=(0, 1)), "no", seed=1, model="DFM")


def all_tables(rows):
    part = one_scenario(rows)
    return [comparison(part, IMAGE_AUROC, "raw"), *gains(part), *costs(part)]


IN_ORDER = all_tables(FEW)


@settings(deadline=None, max_examples=5)
@given(st.permutations(range(len(FEW))))
def test_tables_do_not_depend_on_the_order_of_rows(order):
    assert all_tables(FEW.iloc[order]) == IN_ORDER


def test_costs_are_told_apart_by_machine():
    slow = results(models=("PaDiM", "DFM"), data=DATA[:1], seeds=(7,), machine="slow", fit_seconds=100.0, jobs=2)
    fast = results(models=("PaDiM", "DFM"), data=DATA[:1], machine="fast", fit_seconds=1.0)
    fast["fit_seconds"] *= fast.model.map({"PaDiM": 1, "DFM": 4})
    tables = costs(one_scenario(pd.concat([slow, fast])))
    assert [table.title for table in tables] == ["Cost on fast", "Cost on slow, shared by 2 processes"]
    by_model = {line["model"]: list(line.values()) for line in tables[0].lines}
    # 4 shares and 3 seeds; training is 4 + 5 against 1 + 5 seconds
    assert by_model["DFM"][2:5] == ["12", "4", "5"]
    assert by_model["DFM"][6:8] == ["1.5", "0.5"]
    assert by_model["PaDiM"][6:8] == ["1", "1"]


def test_ratios_are_over_cells_that_both_have():
    rows = results(models=("PaDiM", "DFM"), data=DATA[:1])
    rows["fit_seconds"] = 10.0 * (1 + rows.seed)
    rows = rows[~((rows.model == "DFM") & (rows.seed < 2))].assign(feature_seconds=math.nan)
    (table,) = costs(one_scenario(rows))
    columns = ("fit, s", "features, s", "training, x PaDiM")
    assert {line["model"]: tuple(line[name] for name in columns) for line in table.lines} == {
        "PaDiM": ("20", "-", "1"),
        "DFM": ("30", "-", "1"),
    }
