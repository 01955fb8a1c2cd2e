"""A camera's bit depth from curation to the line: said once in training, known ever after."""

import numpy as np
import pytest
from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.cli import main
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.export import sidecar_of
from tests.conftest import folder

pytestmark = pytest.mark.usefixtures("patches_of_few_images")


def as_the_camera_writes(root):
    """12 bits in 16."""
    for path in root.rglob("*.png"):
        levels = np.asarray(Image.open(path)) / 255 * 4095
        Image.fromarray(levels.round().astype(np.uint16)).save(path)
    return root


def test_from_training_on_copies_to_the_files_of_the_line(parts, tmp_path, capsys):
    camera, copies = as_the_camera_writes(parts), tmp_path / "converted"
    for name in ("train/good", "test/good", "test/blob"):
        assert main(["convert", str(camera / name), "--to", str(copies / name), "--bit-depth", "12"]) == 0
    assert "--model.bit_depth 12" in capsys.readouterr().out
    seed_everything(0, verbose=False)
    model = MetaRefine(
        bit_depth=12, image_size=(96, 96), dimensions=32, meta_steps=1, adaptation_steps=1, rounds=0, visualizer=False
    )
    engine = Engine(default_root_dir=tmp_path / "run", logger=False, accelerator="cpu", limit_val_batches=0)
    engine.fit(model, datamodule=folder(copies))
    engine.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    loaded = load_checkpoint(tmp_path / "trained.ckpt")
    assert sidecar_of(loaded, "openvino", "FP32", None).input["bit_depth"] == 12  # from where the detector takes it
    names = ["test/good/000.png", "test/blob/000.png"]
    on_camera, on_copies = (raw_scores(loaded, [root / name for name in names]).image for root in (camera, copies))
    np.testing.assert_allclose(on_camera, on_copies, rtol=0.01)


@pytest.mark.parametrize("wrong", [0, 33, True, "12"])
def test_what_is_no_bit_depth(wrong):
    with pytest.raises(ValueError, match="bit_depth must be a whole number from 1 to 32"):
        MetaRefine(pre_trained=False, bit_depth=wrong)
