import pandas as pd
import pytest
import torch
from anomalib.engine import Engine
from anomalib.models.components.filters import GaussianBlur2d
from lightning import seed_everything

from anomalib_metarefine.benchmark import others
from anomalib_metarefine.benchmark.memo import Memo, MemoisedImages
from anomalib_metarefine.benchmark.separable import SeparableBlur
from anomalib_metarefine.benchmark.training import train_and_test
from tests.conftest import folder

SIZE = (64, 96)


@pytest.fixture
def small(monkeypatch):
    """Recipes that train in a second."""
    changes = {"Padim": {"n_features": 10}, "Patchcore": {"coreset_sampling_ratio": 0.02},
               "Fastflow": {"flow_steps": 2, "max_steps": 7}}  # fmt: skip
    for name, change in changes.items():
        recipe = others.RECIPES[name]
        smaller = others.Recipe(recipe.model, recipe.arguments | change, batch_size=8)
        monkeypatch.setitem(others.RECIPES, name, smaller)


def plain(name, datamodule, seed):
    """anomalib as a user runs it: its datamodule, its features, its blur."""
    seed_everything(seed, verbose=False)
    model = others.build(name, SIZE)
    engine = Engine(logger=False, enable_progress_bar=False, limit_val_batches=0)
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    return metrics["image_RankAUROC"]


@pytest.mark.parametrize("name", list(others.RECIPES))
def test_memoised_equals_plain(name, parts, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Noise that hides the defects from every model, or all would agree on 1.0 whatever they did.
    datamodule = folder(parts, train_batch_size=others.RECIPES[name].batch_size)
    datamodule.setup()
    hidden = datamodule.test_data.samples.assign(label_index=[0, 1] * 8)
    datamodule.test_data.samples = hidden
    datamodule._is_setup = True
    train = datamodule.train_data.samples
    expected = plain(name, datamodule, seed=3)
    memo = Memo()
    first = train_and_test(name, train, hidden, SIZE, 3, memo).image_auroc
    kept = len(memo)
    again = train_and_test(name, train, hidden, SIZE, 3, memo).image_auroc
    assert 0.05 < expected < 0.95
    assert first == pytest.approx(expected, abs=1e-6)
    assert again == pytest.approx(expected, abs=1e-6)
    assert len(memo) == kept > 0  # the second training embedded nothing
    crowded = train_and_test(name, train, hidden, SIZE, 3, Memo(limit_mb=0.3)).image_auroc
    assert crowded == pytest.approx(expected, abs=1e-6)


def test_labels_are_not_kept(parts):
    memo = Memo()
    path = str(next((parts / "test/blob").iterdir()))
    for label in (0, 1):
        samples = pd.DataFrame({"image_path": [path], "label_index": [label]})
        assert MemoisedImages(samples, SIZE, memo)[0].gt_label == label
    assert len(memo) == 1


def test_the_memo_is_bounded():
    memo = Memo(limit_mb=1)
    for i in range(10):
        memo.put(i, torch.zeros(2**16))  # a quarter of a megabyte each
    assert len(memo) == 4
    memo.clear()
    memo.put("new", torch.zeros(2**18))
    assert len(memo) == 1


def test_the_separable_blur_is_the_blur():
    blur = GaussianBlur2d(kernel_size=(33, 33), sigma=(4, 4), channels=1)
    maps = torch.rand(2, 1, 40, 72) * 30
    torch.testing.assert_close(SeparableBlur(blur)(maps), blur(maps), atol=1e-4, rtol=1e-5)


def test_auroc_of_large_scores():
    metric = others.RankAUROC()
    metric.update(torch.tensor([900.0, 1000.0]), torch.tensor([0, 1]))
    metric.update(torch.tensor([0.5, 1000.1]), torch.tensor([0, 1]))
    assert metric.compute() == 1


def test_unknown_model():
    with pytest.raises(ValueError, match="no recipe for a model 'Padum'"):
        others.build("Padum", SIZE)
