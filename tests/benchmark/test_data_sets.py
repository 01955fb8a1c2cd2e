import pytest

from anomalib_metarefine.benchmark.data_sets import DataSet


def test_data_sets_by_text(parts):
    poly = DataSet.parse("elpv-poly")
    assert (poly.name, poly.class_path, poly.init_args) == (
        "elpv-poly",
        "ELPV",
        {"cell_type": "poly", "train_images": 300},
    )
    assert (poly.image_size, poly.train_images) == ((256, 256), 300)
    assert DataSet.parse("elpv-mono@224x192:200").init_args["train_images"] == 200
    named = DataSet.parse(f"{parts}@160x400:120:belt")
    assert (named.name, named.image_size, named.train_images) == ("belt", (160, 400), 120)
    plain = DataSet.parse(str(parts))
    assert (plain.name, plain.image_size, plain.train_images) == (parts.name, (256, 256), None)
    datamodule = named.datamodule(seed=0)
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (24, 16)


def test_no_image_is_taken_for_validation_and_the_seed_draws():
    def images(**settings):
        datamodule = DataSet("cells", "ELPV", {"train_images": 30, **settings}).datamodule(seed=1)
        datamodule.setup()
        assert len(datamodule.train_data) + len(datamodule.test_data) == 901  # every good and every defective cell
        return datamodule.train_data.samples.image_path.tolist()

    assert images() == images(seed=1) != images(seed=0)


def test_what_is_not_there_is_named(parts):
    with pytest.raises(FileNotFoundError, match="has no folder train/good"):
        DataSet.parse(str(parts / "train"))
    with pytest.raises(ValueError, match="no datamodule 'Elvp'"):
        DataSet("cells", "anomalib.data.Elvp").datamodule(0)
