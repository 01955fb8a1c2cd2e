"""What the product promises, on 300 real solar cells; minutes, so `slow`."""

import time

import pytest
import torch
from anomalib.engine import Engine
from lightning import seed_everything

from anomalib_metarefine import ELPV, Contaminated, MetaRefine

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("contamination", "least_auroc", "most_clean_rejected"), [(0.0, 0.945, 6), (0.4, 0.925, 12)])
def test_accuracy_and_rejection(tmp_path, contamination, least_auroc, most_clean_rejected):
    seed_everything(0, verbose=False)
    datamodule = Contaminated(ELPV(seed=0), contamination, seed=0)
    model = MetaRefine(visualizer=False)
    engine = Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu", limit_val_batches=0)
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule)
    assert metrics["image_AUROC"] >= least_auroc
    wrongly = set(model.refinement.rejected) - set(datamodule.injected)
    assert len(wrongly) <= most_clean_rejected
    if contamination:
        assert len(model.refinement.rejected) > 0.4 * len(datamodule.injected)


def test_training_costs_at_most_three_backbone_passes(tmp_path):
    """Side by side, in one process: decoding and resizing count on both sides."""
    datamodule = ELPV(seed=0)
    datamodule.setup()
    model = MetaRefine(visualizer=False)

    def backbone_pass() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            for batch in datamodule.train_dataloader():
                model.model.embed(model.pre_processor.transform(batch.image))
        return time.perf_counter() - begin

    backbone_pass()  # first touch of the files
    alone = backbone_pass()
    engine = Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu", limit_val_batches=0)
    begin = time.perf_counter()
    engine.fit(model, datamodule=datamodule)
    ratio = (time.perf_counter() - begin) / alone
    print(f"training / backbone pass = {ratio:.2f}")
    assert ratio <= 3
