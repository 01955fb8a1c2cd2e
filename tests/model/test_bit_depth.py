"""A camera's bit depth from curation to the line: said once in training, known ever after."""

import numpy as np
import pytest
from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.cli import main
from anomalib_metarefine.deploy.detector import Detector
from anomalib_metarefine.deploy.sidecar import read_sidecar
from anomalib_metarefine.images.reading import read_image
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.verify import verify_deployment
from tests.conftest import folder

pytestmark = pytest.mark.usefixtures("patches_of_few_images")


def as_the_camera_writes(root):
    """12 bits in 16, with levels that 8 bits can't hold."""
    rng = np.random.default_rng(0)
    for path in root.rglob("*.png"):
        grey = np.asarray(Image.open(path)).astype(np.uint16) * 16
        Image.fromarray(grey + rng.integers(0, 16, grey.shape).astype(np.uint16)).save(path)
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
    engine = Engine(default_root_dir=tmp_path / "run", logger=False, accelerator="cpu")
    engine.fit(model, datamodule=folder(copies))
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    loaded = load_checkpoint(checkpoint)
    assert loaded.bit_depth == 12
    exported = loaded.to_openvino(tmp_path / "export").parent
    assert read_sidecar(exported).input["bit_depth"] == 12
    detector = Detector(exported)
    assert detector.bit_depth == 12
    names = ["test/good/000.png", "test/blob/000.png"]
    scores = {
        root: [detector.predict(read_image(root / name, detector.bit_depth).pixels).raw_score for name in names]
        for root in (camera, copies)
    }
    np.testing.assert_allclose(scores[camera], scores[copies], rtol=0.02)
    verification = verify_deployment(exported, checkpoint, [camera / name for name in names], runs=1)
    assert not [problem for problem in verification.problems if "differ" in problem or "bit_depth" in problem]


@pytest.mark.parametrize("wrong", [0, 33, True, "12"])
def test_what_is_no_bit_depth(wrong):
    with pytest.raises(ValueError, match="bit_depth must be a whole number from 1 to 32"):
        MetaRefine(pre_trained=False, bit_depth=wrong)
