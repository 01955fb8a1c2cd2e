import numpy as np
import pytest
import yaml
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from PIL import Image

from anomalib_metarefine import use_offline_weights
from tests.conftest import folder
from tests.curation.test_manifest import make_manifest


@pytest.fixture
def curated(parts):
    names = [f"train/good/{i:03d}.png" for i in range(24)]
    decisions = dict(zip(names, ["reject"] * 4 + ["review"] * 2 + ["keep"] * 18, strict=True))
    return make_manifest(parts, decisions)


def test_without_a_test_set(curated):
    datamodule = curated.datamodule(num_workers=0, train_batch_size=4)
    datamodule.setup()
    assert len(datamodule.train_data) == 20
    assert set(datamodule.train_data.samples.label_index) == {0}
    assert next(iter(datamodule.train_dataloader())).image.shape == (4, 3, 96, 96)
    datamodule = curated.datamodule(review="reject")
    datamodule.setup()
    assert datamodule.train_data.samples.image_path.tolist() == [str(path) for path in curated.kept]


@pytest.mark.parametrize(("mode", "test", "val"), [("same_as_test", 16, 16), ("from_test", 8, 8), ("none", 16, 0)])
def test_keeps_the_users_test_set(curated, parts, mode, test, val):
    theirs = folder(parts, val_split_mode=mode, seed=3)
    datamodule = curated.datamodule(test=theirs)
    assert not hasattr(theirs, "test_data")  # the user's datamodule is not set up behind their back
    theirs.setup()
    datamodule.setup()
    assert len(datamodule.train_data) == 20
    assert datamodule.test_data.samples.image_path.tolist() == theirs.test_data.samples.image_path.tolist()
    assert datamodule.test_data.samples.label_index.tolist() == theirs.test_data.samples.label_index.tolist()
    assert (len(datamodule.test_data), len(getattr(datamodule, "val_data", []))) == (test, val)
    assert (datamodule.train_batch_size, datamodule.num_workers) == (8, 0)


def test_from_a_config_without_normal_test_images(curated, parts):
    settings = {"name": "parts", "root": str(parts), "normal_dir": "train/good", "abnormal_dir": "test/blob"}
    settings |= {"test_split_mode": "none", "val_split_mode": "none"}
    (parts / "data.yaml").write_text(yaml.safe_dump({"data": {"class_path": "Folder", "init_args": settings}}))
    datamodule = curated.datamodule(test=parts / "data.yaml")
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (20, 8)


def test_warns_of_test_images_that_are_trained_on(curated, parts, caplog):
    curated.datamodule(test=Folder(name="same", root=parts, normal_dir="test/good", normal_test_dir="train/good"))
    assert "20 test images are training images too: " in caplog.text


def test_a_validation_folder_becomes_the_test_set(curated, parts, caplog):
    datamodule = curated.datamodule(test=folder(parts, val_split_mode="from_dir"))
    datamodule.setup()
    assert datamodule.val_data.samples.equals(datamodule.test_data.samples)
    assert "parts has a validation folder" in caplog.text


def test_settings_win(curated, parts):
    settings = {"name": "mine", "eval_batch_size": 3, "val_split_mode": "none"}
    datamodule = curated.datamodule(test=folder(parts), **settings)
    assert {name: getattr(datamodule, name) for name in settings} == settings


def test_refuses(curated, parts):
    with pytest.raises(ValueError, match="synthetic and vanishes"):
        curated.datamodule(test=folder(parts, test_split_mode="synthetic"))
    with pytest.raises(ValueError, match="review must be"):
        curated.datamodule(review="maybe")
    nothing = make_manifest(parts, {"train/good/000.png": "reject"})
    with pytest.raises(ValueError, match="nothing to train on: {'keep': 0, 'reject': 1, 'review': 0}"):
        nothing.datamodule()
    (parts / "train/good/000.png").unlink()  # a rejected image may be gone
    curated.datamodule()
    (parts / "train/good/010.png").unlink()
    with pytest.raises(ValueError, match=r"1 missing \(train/good/010.png\)"):
        curated.datamodule()


def test_trains_padim_without_a_test_set(curated, tmp_path):
    use_offline_weights()
    engine = Engine(default_root_dir=tmp_path / "runs", logger=False, accelerator="cpu", limit_val_batches=0)
    engine.fit(padim(), datamodule=curated.datamodule(num_workers=0))
    assert engine.trainer.num_training_batches == 1
    assert engine.trainer.current_epoch == 1


def test_trains_padim_and_scores_pixels(curated, parts, tmp_path):
    use_offline_weights()
    (parts / "masks").mkdir()
    for path in (parts / "test" / "blob").iterdir():
        Image.fromarray((np.array(Image.open(path)) == 250).astype(np.uint8) * 255).save(parts / "masks" / path.name)
    model = padim()
    engine = Engine(default_root_dir=tmp_path / "runs", logger=False, accelerator="cpu")
    datamodule = curated.datamodule(test=folder(parts, mask_dir="masks"))
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule)
    assert metrics["image_AUROC"] > 0.9
    assert metrics["pixel_AUROC"] > 0.9


def padim() -> Padim:
    layers = ["blocks.2", "blocks.4"]
    return Padim(backbone="tf_efficientnet_lite0", layers=layers, n_features=100, visualizer=False)
