import math

import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anomalib_metarefine.benchmark.report.cells import REFINED, UNREFINED
from anomalib_metarefine.benchmark.report.tables import gains, paired, recovered_share
from tests.benchmark.report.made_up import results
from tests.benchmark.report.test_tables import figures, one_scenario

TRAININGS = ("raw", "curated", "clean")


def rows(values):
    """``values``: (model, data, contamination, seed) -> image AUROC raw, curated, clean."""
    cells = {}
    for (model, data, contamination, seed), aurocs in values.items():
        for training, auroc in zip(TRAININGS, aurocs, strict=True):
            cells[data, "", contamination, seed, model, training] = auroc
    curated = {"rejected": 6, "precision": 0.5, "recall": 0.75}
    return figures(cells).assign(**curated)


VALUES = {
    ("PaDiM", "parts", 0.2, 0): (0.80, 0.86, 0.90),
    ("PaDiM", "parts", 0.2, 1): (0.60, 0.72, 0.80),
    ("PaDiM", "parts", 0.0, 0): (0.90, 0.89, 0.90),
    ("DFM", "parts", 0.4, 0): (0.70, 0.65, 0.90),
}


def cells(table, columns=3):
    plain = [[text.partition(" [")[0] for text in line.values()] for line in table.lines]
    return {tuple(row[:columns]): row[columns:] for row in plain}


def test_mean_spread_and_ratio_of_means():
    _, everywhere = gains(rows(VALUES))
    assert cells(everywhere) == {
        # (0.06 + 0.12) / (0.10 + 0.20), which is not the mean of 60 % and 60 % by chance alone; see below
        ("PaDiM", "parts", "20 %"): [
            "2", "70.0 ± 14.1", "79.0 ± 9.9", "85.0 ± 7.1", "60 %", "6.0", "50 %", "75 %",
        ],
        ("PaDiM", "parts", "0 %"): ["1", "90.0", "89.0", "90.0", "-", "6.0", "50 %", "75 %"],
        ("DFM", "parts", "40 %"): ["1", "70.0", "65.0", "90.0", "-25 %", "6.0", "50 %", "75 %"],
    }  # fmt: skip


def test_ratio_of_means_is_not_the_mean_of_ratios():
    pairs = pd.DataFrame({"raw": [0.50, 0.80], "curated": [0.60, 0.81], "clean": [0.90, 0.81]})
    assert recovered_share(pairs) == pytest.approx(0.11 / 0.41)


def test_no_gap_no_share():
    pairs = pd.DataFrame({"raw": [0.9], "curated": [0.95], "clean": [0.904]})
    assert math.isnan(recovered_share(pairs))
    assert math.isnan(recovered_share(pairs.iloc[:0]))


AUROC = st.floats(0.3, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(AUROC, AUROC, AUROC), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_recovered_share_is_a_share_of_the_gap(values, random):
    pairs = pd.DataFrame(values, columns=list(TRAININGS))
    assume((pairs.clean - pairs.raw).mean() > 0.006)
    found = recovered_share(pairs)
    shuffled = random.sample(values, len(values))
    assert recovered_share(pd.DataFrame(shuffled, columns=list(TRAININGS))) == pytest.approx(found)
    assert recovered_share(pairs - 0.1) == pytest.approx(found)  # a harder test set
    assert recovered_share(pairs.assign(curated=pairs.raw)) == 0
    assert recovered_share(pairs.assign(curated=pairs.clean)) == pytest.approx(1)
    half = (pairs.raw + pairs.clean) / 2
    assert recovered_share(pairs.assign(curated=half)) == pytest.approx(0.5)


def test_seeds_without_all_three_trainings_are_left_out():
    table = rows(VALUES)
    unfinished = table[~((table.seed == 1) & (table.training == "clean"))]
    assert paired(unfinished).groupby(["model", "contamination"]).size()["PaDiM", 0.2] == 1


def test_averages_are_over_cells_that_all_models_have():
    values = {
        ("PaDiM", "a", 0.2, 0): (0.80, 0.85, 0.90), ("DFM", "a", 0.2, 0): (0.60, 0.75, 0.80),
        ("PaDiM", "b", 0.2, 0): (0.70, 0.71, 0.90),  # DFM is not there
        ("PaDiM", "a", 0.0, 0): (0.90, 0.88, 0.90), ("DFM", "a", 0.0, 0): (0.90, 0.90, 0.90),
    }  # fmt: skip
    average, _ = gains(rows(values))
    assert list(average.lines[0]) == ["", "DFM", "PaDiM", "all"]
    assert cells(average, 1) == {
        ("recovered at 20 %",): ["75 %", "50 %", "67 %"],
        ("recovered, all dirty",): ["75 %", "50 %", "67 %"],
        ("lost on clean data",): ["0.0", "2.0", "1.0"],
    }
    assert list(average.notes) == ["Over a; seeds 0."]


def test_refinement_of_its_own_is_a_curation_of_the_unrefined_model():
    values = {
        (UNREFINED, "a", 0.2, 0): (0.80, 0.82, 0.90), (REFINED, "a", 0.2, 0): (0.88, 0.89, 0.91),
    }  # fmt: skip
    everywhere = gains(rows(values))[1]
    found = cells(everywhere)["MetaRefine's own refinement", "a", "20 %"]
    assert found[1:5] == ["80.0", "88.0", "90.0", "80 %"]
    alone = paired(rows({(REFINED, "a", 0.2, 0): (0.88, 0.89, 0.91)}))
    assert alone.model.tolist() == [REFINED]


def test_repair_is_another_curation():
    values = {
        ("PaDiM", "a", 0.2, 0): (0.80, 0.82, 0.90), ("DFM", "a", 0.2, 0): (0.70, 0.75, 0.80),
        (UNREFINED, "a", 0.2, 0): (0.80, 0.82, 0.90), (REFINED, "a", 0.2, 0): (0.88, 0.89, 0.91),
    }  # fmt: skip
    table = rows(values)
    repaired = table[(table.model == "PaDiM") & (table.training == "raw")].assign(training="repaired", image_AUROC=0.88)
    average, everywhere = gains(pd.concat([table, repaired], ignore_index=True))
    found = cells(everywhere)
    assert found["PaDiM", "a", "20 %"][1:5] == ["80.0", "82.0", "90.0", "20 %"]
    assert found["PaDiM, repaired", "a", "20 %"][1:5] == ["80.0", "88.0", "90.0", "80 %"]
    assert ("DFM, repaired", "a", "20 %") not in found
    last = average.lines[0]
    assert (last["PaDiM, repaired"], last["all, repaired"], last["MetaRefine's own refinement"]) == (
        "80 %",
        "80 %",
        "80 %",
    )
    # Of PaDiM, DFM and the two that refine themselves, without what is repaired: (2 + 5 + 2 + 1) / (10 + 10 + 10 + 3).
    assert last["all"] == "30 %"


def test_no_curated_training_no_table():
    made = one_scenario(results(seeds=(0,)))
    assert gains(made[(made.training != "curated") & (made.model != REFINED)]) == []
