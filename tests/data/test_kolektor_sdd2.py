import importlib.metadata
import logging
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import get_datamodule
from anomalib.data.utils import Split, ValSplitMode
from anomalib.data.utils.download import generate_hash
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_metarefine import Contaminated, KolektorSDD2, register
from anomalib_metarefine.data import kolektor_sdd2
from anomalib_metarefine.data.kolektor_sdd2 import KolektorSDD2Dataset, has_defect, make_kolektor_sdd2_samples

GOOD = {"train": 8, "test": 5}
BAD = {"train": 3, "test": 4}


@pytest.fixture
def root(tmp_path):
    """The official layout, with its stray copies, in small: images of several sizes, defective ones first."""
    rng = np.random.default_rng(0)
    for split, first in (("train", 10000), ("test", 20000)):
        (tmp_path / split).mkdir()
        for i in range(GOOD[split] + BAD[split]):
            size = (63 + i, 23 - i % 3)
            mask = np.zeros(size, dtype=np.uint8)
            mask[20:30, 5:9] = 255 * (i < BAD[split])
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(
                tmp_path / split / f"{first + i}.png"
            )
            Image.fromarray(mask).save(tmp_path / split / f"{first + i}_GT.png")
    for name in ("10001", "10001_GT"):
        shutil.copy(tmp_path / "train" / f"{name}.png", tmp_path / "train" / f"{name} (copy).png")
    (tmp_path / "split_weakly_0.pyb").write_bytes(b"a pickle of the official archive")
    return tmp_path


def labels(dataset):
    return {Path(row.image_path).name: row.label_index for row in dataset.samples.itertuples()}


@pytest.mark.parametrize(
    ("train_defects", "train", "test"),
    [
        ("drop", [0] * 8, [1] * 4 + [0] * 5),
        ("keep", [0] * 11, [1] * 4 + [0] * 5),
        ("test", [0] * 8, [1] * 4 + [0] * 5 + [1] * 3),
    ],
)
def test_splits_and_labels(root, train_defects, train, test):
    datamodule = KolektorSDD2(root, train_defects)
    datamodule.setup()
    assert list(labels(datamodule.train_data).values()) == train
    assert list(labels(datamodule.test_data).values()) == test
    assert (datamodule.train_data.samples.split == "train").all()
    assert (datamodule.test_data.samples.split == "test").all()
    assert datamodule.train_data.task == datamodule.test_data.task == "segmentation"
    unlabelled = [Path(path).name for path in datamodule.unlabelled_defects]
    assert unlabelled == (["10000.png", "10001.png", "10002.png"] if train_defects == "keep" else [])


def test_one_dataset_for_both_splits(root):
    assert len(KolektorSDD2Dataset(root)) == 17
    assert len(KolektorSDD2Dataset(root, train_defects="keep")) == 20
    assert len(KolektorSDD2Dataset(root, split=Split.TEST)) == len(KolektorSDD2Dataset(root, split="test")) == 9


def test_one_faint_pixel_is_a_defect(tmp_path):
    mask = np.zeros((9, 9), dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "none.png")
    mask[8, 0] = 1
    Image.fromarray(mask).save(tmp_path / "one.png")
    assert not has_defect(tmp_path / "none.png")
    assert has_defect(tmp_path / "one.png")


def test_batches_have_masks(root):
    datamodule = KolektorSDD2(root, "keep", 32, 32, num_workers=0, augmentations=Resize((64, 24)))
    datamodule.setup()
    test = next(iter(datamodule.test_dataloader()))
    assert test.image.shape == (9, 3, 64, 24)
    assert test.gt_mask.flatten(1).any(dim=1).tolist() == test.gt_label.tolist()
    assert test.gt_label.sum() == 4
    train = next(iter(datamodule.train_dataloader()))
    assert not train.gt_mask.any()  # a model must not see which of them are defective


def test_warns_of_a_subset(root, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        make_kolektor_sdd2_samples(root)
    assert "train has 11 images, the official data set 2331" in caplog.text
    assert "test has 9 images, the official data set 1004" in caplog.text
    caplog.clear()
    monkeypatch.setattr(kolektor_sdd2, "OFFICIAL_IMAGES", {Split.TRAIN: 11, Split.TEST: 9})
    make_kolektor_sdd2_samples(root)
    assert not caplog.text


def test_says_what_is_wrong(root, tmp_path):
    with pytest.raises(ValueError, match="'drop', 'keep' or 'test', found 'all'"):
        KolektorSDD2(root, "all")
    with pytest.raises(ValueError, match="'drop', 'keep' or 'test', found 'all'"):
        make_kolektor_sdd2_samples(root, train_defects="all")
    (root / "train" / "10004_GT.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"10004_GT.png can't be read"):
        KolektorSDD2(root).setup()
    (root / "train" / "10004_GT.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"10004.png has no mask 10004_GT.png.* 1 of the 11"):
        KolektorSDD2(root).setup()
    with pytest.raises(FileNotFoundError, match="No images in .*train.*https://go.vicos.si/kolektorsdd2"):
        KolektorSDD2(root / "train").setup()


def test_what_is_there_is_not_fetched_again(root, monkeypatch):
    monkeypatch.setattr(kolektor_sdd2, "download_and_extract", None)
    KolektorSDD2(root).prepare_data()


def test_unpacks_an_archive_put_there_by_hand(root, tmp_path, monkeypatch):
    target = tmp_path / "datasets"
    target.mkdir()
    archive = target / "KolektorSDD2.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.glob("t*/*.png")):
            file.write(path, path.relative_to(root))
    official = kolektor_sdd2.DOWNLOAD_INFO
    with pytest.raises(RuntimeError, match=rf"required hash {official.hashsum}.* Delete {archive}"):
        KolektorSDD2(target).prepare_data()
    monkeypatch.setattr(kolektor_sdd2, "DOWNLOAD_INFO", replace(official, hashsum=generate_hash(archive)))
    datamodule = KolektorSDD2(target)
    datamodule.prepare_data()
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (8, 9)


def test_says_what_to_do_without_a_connection(tmp_path, monkeypatch):
    def no_connection(root, info):
        raise OSError("<urlopen error no route>")

    monkeypatch.setattr(kolektor_sdd2, "download_and_extract", no_connection)
    with pytest.raises(RuntimeError, match="no route.*fetch https://go.vicos.si/kolektorsdd2 by hand"):
        KolektorSDD2(tmp_path).prepare_data()


def test_contamination_draws_from_the_larger_pool_and_refuses_dirty_training_sets(root):
    def contaminated(train_defects):
        source = KolektorSDD2(root, train_defects, num_workers=0, val_split_mode=ValSplitMode.NONE)
        dirty = Contaminated(source, 0.5, train_images=10)
        dirty.setup()
        return dirty

    assert len(contaminated("test").injected) == 5
    with pytest.raises(ValueError, match="needs 5 defective.*has 4"):
        contaminated("drop")
    with pytest.raises(ValueError, match="3 defective images already.*train_defects"):
        contaminated("keep")


def test_anomalib_knows_it(root):
    try:
        importlib.metadata.distribution("anomalib-metarefine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is on the path but not installed")
    register()
    datamodule = get_datamodule({"class_path": "KolektorSDD2", "init_args": {"root": str(root)}})
    assert isinstance(datamodule, KolektorSDD2)
