"""A model that is updated."""

import numpy as np
import pytest
import torch
from anomalib.engine import Engine

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.model.initialisation import learn_shared
from anomalib_metarefine.settings import Settings
from tests.conftest import folder, part

FIT = {
    "image_size": (96, 96), "dimensions": 32, "adaptation_steps": 2, "patch_fence": 0, "visualizer": False,
    "rule": "auto:level=1e-6",  # so few images: odd good ones are kept
}  # fmt: skip


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """26 plates of a training, three of them dirty; 8 that come later, the last dirty; a start to learn from."""
    root = tmp_path_factory.mktemp("update")
    rng = np.random.default_rng(0)
    for name, count, dirty in [("train/good", 26, 3), ("later", 8, 1), ("test/good", 4, 0), ("test/blob", 4, 4)]:
        (root / name).mkdir(parents=True)
        for i in range(count):
            part(rng, defect=i >= count - dirty).save(root / name / f"{name[:2]}{i:03d}.png")
    settings = Settings(dimensions=32, meta_steps=1, batch_patches=64)
    learn_shared([(root / "test/good", (96, 96))], settings=settings, progress=False).save(root / "start.pt")
    return root


def fit(root, start, name="a", **settings):
    results = root / name / "results"
    runner = Engine(default_root_dir=results, logger=False, accelerator="cpu", limit_val_batches=0)
    torch.manual_seed(0)
    runner.fit(MetaRefine(**{**FIT, "init_from": start, **settings}), datamodule=folder(root))
    return runner.trainer.checkpoint_callback.best_model_path


@pytest.fixture(scope="session")
def checkpoint(line):
    return fit(line, line / "start.pt")
