import pytest
import torch
from anomalib.models.components import KCenterGreedy
from lightning import seed_everything

from studies.baselines.patchcore import select


def both(points, ratio):
    """What we choose, and what anomalib chooses."""
    found = []
    for choose in (select, KCenterGreedy.select_coreset_idxs):
        seed_everything(0, verbose=False)
        found.append(choose(KCenterGreedy(points, ratio)))
    return found


def clusters(count, channels):
    torch.manual_seed(1)
    centers = 20 * torch.randn(12, channels)
    return centers[torch.randint(12, (count,))] + torch.randn(count, channels)


@pytest.mark.parametrize("ratio", [0.01, 0.1])
@pytest.mark.parametrize("points", [clusters(3000, 40), torch.rand(2000, 24) + 50, clusters(90, 7)])
def test_it_chooses_what_anomalib_chooses(points, ratio):
    quick, upstream = both(points, ratio if len(points) > 100 else 0.5)
    assert quick == upstream
    assert len(quick) == int(len(points) * (ratio if len(points) > 100 else 0.5))


def test_points_on_top_of_each_other():
    points = clusters(40, 8).repeat(5, 1)
    quick, upstream = both(points, 0.15)  # 30 of 40 different ones
    assert quick == upstream


def test_everything_can_be_chosen():
    points = clusters(60, 8)
    quick, upstream = both(points, 1.0)
    assert quick == upstream
    assert sorted(quick) == list(range(60))


def test_a_coreset_of_one():
    quick, upstream = both(clusters(60, 8), 1 / 60)
    assert len(quick) == 1
    assert quick == upstream
