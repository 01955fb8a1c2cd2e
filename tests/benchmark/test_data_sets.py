import pytest

from anomalib_metarefine.benchmark.data_sets import DataSet


def test_no_image_is_taken_for_validation_and_the_seed_draws():
    def images(**settings):
        datamodule = DataSet("cells", "ELPV", {"train_images": 30, **settings}).datamodule(seed=1)
        datamodule.setup()
        assert len(datamodule.train_data) + len(datamodule.test_data) == 901  # every good and every defective cell
        return datamodule.train_data.samples.image_path.tolist()

    assert images() == images(seed=1) != images(seed=0)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="no datamodule 'Elvp'"):
        DataSet("cells", "anomalib.data.Elvp").datamodule(0)
