import numpy as np
import pandas as pd
import pytest

from studies.detection import main
from tests.conftest import part


@pytest.fixture
def many_parts(parts):
    """More good parts than the fixture has, so that there is a majority to speak of."""
    rng = np.random.default_rng(1)
    for i in range(24, 40):
        part(rng).save(parts / f"train/good/{i:03d}.png")
    return parts


def test_finds_the_dirty_images_and_goes_on_where_it_stopped(many_parts, tmp_path):
    out = tmp_path / "detection.csv"
    arguments = ["--out", str(out), "--data", f"{many_parts}@96x96:40:parts", "--seeds", "0"]
    main([*arguments, "--contamination", "0", "0.1"])
    rows = pd.read_csv(out)
    assert rows.dirty.tolist() == [0, 4]
    assert rows.rejected[0] == 0
    assert rows.last_AUROC[1] == 1
    main([*arguments, "--contamination", "0", "0.1", "--rules", "auto", "share:0.1"])
    rows = pd.read_csv(out)
    assert rows.rule.tolist() == ["auto", "auto", "share:0.1", "share:0.1"]
    assert rows.rejected.tolist()[2:] == [4, 4]
    assert (rows.recall[3], rows.precision[3]) == (1, 1)
