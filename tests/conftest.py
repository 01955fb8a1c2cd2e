"""Shared fixtures: a small folder of images that look like parts, with defects that can be seen."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from anomalib.data import Folder
from PIL import Image
from torch import nn


def part(rng: np.random.Generator, size: tuple[int, int] = (96, 96), defect: bool = False) -> Image.Image:
    """A striped plate with noise; a defect is a bright blob on it."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    pixels = 120 + 40 * np.sin(rows / 6) + 10 * np.cos(columns / 9) + rng.normal(0, 4, size)
    if defect:
        y, x = rng.integers(height // 4, 3 * height // 4), rng.integers(width // 4, 3 * width // 4)
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < (height // 8) ** 2] = 250
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """``train/good`` (24 images), ``test/good`` (8) and ``test/blob`` (8) in one folder."""
    rng = np.random.default_rng(0)
    for folder, count, defect in [("train/good", 24, False), ("test/good", 8, False), ("test/blob", 8, True)]:
        (tmp_path / folder).mkdir(parents=True)
        for i in range(count):
            part(rng, defect=defect).save(tmp_path / folder / f"{i:03d}.png")
    return tmp_path


@pytest.fixture
def datamodule(parts: Path) -> Folder:
    """The folder as anomalib reads it."""
    return folder(parts)


def plate(noise, spot=False):
    """A striped plate, the same in every image but for its noise; a spot is always at one place."""
    rows, columns = np.mgrid[:96, :96]
    pixels = 120 + 40 * np.sin(rows / 6) + 10 * np.cos(columns / 9)
    pixels += np.random.default_rng(int(100 * noise)).normal(0, noise, pixels.shape)
    if spot:
        pixels[36:48, 36:48] += 100
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def spotted(tmp_path):
    """24 plates that are ever noisier, three of them with a spot, and a test set to detect it in."""
    for name in ("train/good", "test/good", "test/blob"):
        (tmp_path / name).mkdir(parents=True)
    for i in range(24):
        plate(2 + i, spot=i % 8 == 3).save(tmp_path / "train/good" / f"{i:02d}.png")
    for i in range(4):
        plate(5.01 + i).save(tmp_path / "test/good" / f"{i}.png")
        plate(5.02 + i, spot=True).save(tmp_path / "test/blob" / f"{i}.png")
    return tmp_path


def folder(root: Path, **settings) -> Folder:
    return Folder(
        name="parts",
        root=root,
        normal_dir="train/good",
        abnormal_dir="test/blob",
        normal_test_dir="test/good",
        **{"train_batch_size": 8, "eval_batch_size": 8, "num_workers": 0, "val_split_mode": "same_as_test", **settings},
    )


@pytest.fixture(scope="session")
def ray_here():
    """A Ray of two workers on this machine; it takes seconds to start."""
    ray = pytest.importorskip("ray", reason="Ray (extra `ray`) is not installed.")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    yield
    ray.shutdown()


class Trained(NamedTuple):
    """The checkpoint's model, the folder of its export, the checkpoint."""

    model: nn.Module
    folder: Path
    checkpoint: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """MetaRefine with a small density on 12 real solar cells."""
    from anomalib.engine import Engine
    from lightning import seed_everything

    from anomalib_metarefine import ELPV, MetaRefine

    root = tmp_path_factory.mktemp("trained")
    seed_everything(0, verbose=False)
    datamodule = ELPV(train_images=12, eval_batch_size=16)
    quick = {"dimensions": 32, "blocks": 2, "hidden": 16, "meta_steps": 1, "episodes": 1, "support_images": 4}
    quick |= {"inner_steps": 1, "adaptation_steps": 1, "batch_patches": 256, "rounds": 0, "image_size": (128, 128)}
    model = MetaRefine(visualizer=False, **quick)
    engine = Engine(default_root_dir=root, logger=False, accelerator="cpu", limit_val_batches=1)
    engine.fit(model, datamodule=datamodule)
    checkpoint = Path(engine.trainer.checkpoint_callback.best_model_path)
    return Trained(model.eval().cpu(), model.to_openvino(root).parent, checkpoint)


@pytest.fixture(scope="module")
def patches_of_few_images():
    """Regions are left out from one patch and from 8 images on, so that toys can be small."""
    from anomalib_metarefine.curation import evidence
    from anomalib_metarefine.refinement import learned, patches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "_FEWEST_FOR_REGIONS", 8)
        patch.setattr(learned, "LEAST_REGION", 1)
        patch.setattr(evidence, "LEAST_REPAIRED", 1)
        yield
