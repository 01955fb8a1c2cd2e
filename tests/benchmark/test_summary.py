import math

import pandas as pd
import pytest

from anomalib_metarefine.benchmark.summary import markdown, paired, recovered_share, summarise
from anomalib_metarefine.benchmark.table import COLUMNS


def rows(figures):
    """``figures``: (model, contamination, seed) -> AUROC raw, curated, clean."""
    table = []
    for (model, contamination, seed), values in figures.items():
        for training, auroc in zip(["raw", "curated", "clean"], values, strict=True):
            table.append(
                dict.fromkeys(COLUMNS, 0)
                | {"data": "parts", "model": model, "contamination": contamination, "seed": seed, "training": training}
                | {"image_AUROC": auroc, "rejected": 6, "precision": 0.5, "recall": 0.75, "train_images": 20}
                | {"image_size": "64x64", "settings": "depth=1", "versions": "anomalib 2.7.0"}
            )
    return pd.DataFrame(table)


TABLE = rows(
    {
        ("Padim", 0.2, 0): (0.80, 0.86, 0.90),
        ("Padim", 0.2, 1): (0.60, 0.72, 0.80),
        ("Padim", 0.0, 0): (0.90, 0.89, 0.90),
        ("Dfm", 0.4, 0): (0.70, 0.65, 0.90),
    }
)


def test_mean_spread_and_ratio_of_means():
    cell = summarise(TABLE).set_index(["model", "contamination"]).loc[("Padim", 0.2)]
    assert cell.seeds == 2
    assert cell.raw == pytest.approx(0.70)
    assert cell.raw_sd == pytest.approx(0.2 / math.sqrt(2))
    assert cell.recovered == pytest.approx(0.09 / 0.15)  # not the mean of 0.6 and 0.6
    assert (cell.rejected, cell.precision, cell.recall) == (6, 0.5, 0.75)


def test_ratio_of_means_is_not_the_mean_of_ratios():
    pairs = pd.DataFrame({"raw": [0.50, 0.80], "curated": [0.60, 0.81], "clean": [0.90, 0.81]})
    assert recovered_share(pairs) == pytest.approx(0.11 / 0.41)


def test_no_gap_no_share():
    pairs = pd.DataFrame({"raw": [0.9], "curated": [0.95], "clean": [0.904]})
    assert math.isnan(recovered_share(pairs))
    assert math.isnan(recovered_share(pairs.iloc[:0]))


def test_a_curation_that_harms_recovers_a_negative_share():
    cell = summarise(TABLE).set_index("model").loc["Dfm"]
    assert cell.recovered == pytest.approx(-0.25)
    assert math.isnan(cell.raw_sd)  # one seed has no spread


def test_seeds_without_all_three_trainings_are_left_out():
    unfinished = TABLE[~((TABLE.seed == 1) & (TABLE.training == "clean"))]
    assert summarise(unfinished).set_index(["model", "contamination"]).loc[("Padim", 0.2), "seeds"] == 1


def test_markdown_says_what_was_found():
    text = markdown(TABLE)
    assert (
        "| Padim | parts | 20% | 2 | 0.700 ± 0.141 | 0.790 ± 0.099 | 0.850 ± 0.071 | 60% | 6.0 | 0.50 | 0.75 |" in text
    )
    assert "| Padim | parts | 0% | 1 | 0.900 | 0.890 | 0.900 | - |" in text
    assert "| Padim | 60% | - | 60% | 1.00 |" in text
    assert "| Dfm | - | -25% | -25% | - |" in text
    # (0.06 + 0.12 - 0.05) / (0.10 + 0.20 + 0.20): every run weighs by its own gap
    assert "| all | 60% | -25% | 26% | 1.00 |" in text
    assert "parts at 64x64, 20 training images" in text
    assert "- Padim: depth=1" in text
    assert "EfficientAd is not in this table" in text


def test_markdown_of_an_unfinished_table():
    assert "No model" in markdown(TABLE[TABLE.training == "raw"])


def test_two_settings_of_one_model_cannot_be_averaged():
    twice = pd.concat([TABLE, TABLE.assign(settings="depth=2")])
    with pytest.raises(ValueError, match="more than one setting"):
        paired(twice)
