import pytest

from studies.data_sets import parse_data_set


def test_data_sets_by_text(parts):
    poly = parse_data_set("elpv-poly")
    assert (poly.name, poly.class_path, poly.init_args) == (
        "elpv-poly",
        "ELPV",
        {"cell_type": "poly", "train_images": 300},
    )
    assert (poly.image_size, poly.train_images) == ((256, 256), 300)
    assert parse_data_set("elpv-mono@224x192:200").init_args["train_images"] == 200
    named = parse_data_set(f"{parts}@160x400:120:belt")
    assert (named.name, named.image_size, named.train_images) == ("belt", (160, 400), 120)
    plain = parse_data_set(str(parts))
    assert (plain.name, plain.image_size, plain.train_images) == (parts.name, (256, 256), None)
    datamodule = named.datamodule(seed=0)
    datamodule.setup()
    assert (len(datamodule.train_data), len(datamodule.test_data)) == (24, 16)


def test_what_is_not_there_is_named(parts):
    with pytest.raises(FileNotFoundError, match="has no folder train/good"):
        parse_data_set(str(parts / "train"))
