"""A shared initialisation: learned on two categories, written, read and handed to a model."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from anomalib_metarefine.features.backbone import Backbone
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.model.initialisation import SharedInitialisation, architecture, learn_shared
from anomalib_metarefine.model.torch_model import MetaRefineModel
from anomalib_metarefine.settings import Settings
from tests.conftest import part

SIZE = {"dimensions": 16, "blocks": 2, "hidden": 8}
SMALL = Settings(**SIZE, meta_steps=2, batch_patches=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two categories: square parts, and wide ones."""
    root, rng = tmp_path_factory.mktemp("categories"), np.random.default_rng(0)
    for name, size in [("square", (96, 96)), ("wide", (64, 128))]:
        (root / name).mkdir()
        for i in range(5):
            part(rng, size).save(root / name / f"{i}.png")
    (root / "square" / "broken.png").write_text("not an image")
    return [(root / "square", (96, 96)), (str(root / "wide"), (64, 128))]


def learn(data, seed=0, **settings):
    return learn_shared(data, settings=dataclasses.replace(SMALL, **settings), seed=seed, progress=False)


@pytest.fixture(scope="module")
def shared(data):
    return learn(data)


def model(**size):
    return MetaRefineModel(OFFLINE_BACKBONE, **{**SIZE, **size})


def assert_equal(first, second):
    assert (first.made_for, first.run) == (second.made_for, second.run)
    for name in ("whitening", "flow"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)


def test_it_is_learned_on_both_categories_and_says_so(data, shared):
    assert shared.run["data"] == [
        {"source": str(data[0][0]), "images": 5, "image_size": [96, 96]},
        {"source": data[1][0], "images": 5, "image_size": [64, 128]},
    ]
    assert shared.run["seed"] == 0
    assert shared.run["settings"] == SMALL.as_dict()
    assert shared.run["versions"]["torch"]
    assert shared.made_for == {"backbone": OFFLINE_BACKBONE, "layers": Backbone().layers, **SIZE}
    assert shared.whitening.projection.shape == (152, 16)
    assert not torch.equal(shared.whitening.mean, learn(data[:1], meta_steps=0).whitening.mean)


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "pretraining"])
def test_the_flow_learns_by_any_algorithm(data, algorithm):
    learned = learn(data, meta_algorithm=algorithm).flow
    values = {name: value for name, value in learned.items() if name.endswith("2.weight")}
    assert len(values) == SIZE["blocks"]
    assert all(value.any() and value.isfinite().all() for value in values.values())  # untrained, these are zero


def test_the_size_may_be_left_to_the_images_and_dimensions_are_at_most_the_backbones(data):
    found = learn([(data[1][0], None)], dimensions=1000, meta_steps=0)
    assert found.run["data"][0]["image_size"] == [192, 352]
    assert found.made_for["dimensions"] == 152


def test_same_seed_same_result_whatever_was_drawn_before(data, shared):
    torch.rand(7)
    assert_equal(learn(data), shared)
    other = learn(data, seed=1)
    assert any(not torch.equal(value, other.flow[name]) for name, value in shared.flow.items())


def test_what_is_saved_is_loaded_without_running_code(shared, tmp_path):
    found, path = shared, tmp_path / "new" / "folder" / "start.pt"
    found.save(path)
    assert_equal(SharedInitialisation.load(str(path)), found)
    assert torch.load(path, weights_only=True)["run"] == found.run


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt.*metarefine meta-train"):
        SharedInitialisation.load(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match="metarefine meta-train"):
        SharedInitialisation.load(tmp_path)  # a folder


class Harmful:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_text(path, found):
    path.write_text("no initialisation")


def write_nothing(path, found):
    path.write_bytes(b"")


def write_weights(path, found):
    torch.save({"state_dict": {"w": torch.zeros(3)}}, path)


def write_a_list(path, found):
    torch.save([1, 2], path)


def write_truncated(path, found):
    found.save(path)
    path.write_bytes(path.read_bytes()[:-1000])


def write_from_the_future(path, found):
    found.save(path)
    torch.save(torch.load(path, weights_only=True) | {"metarefine_initialisation": 3}, path)


def write_without_a_part(path, found):
    found.save(path)
    parts = torch.load(path, weights_only=True)
    del parts["made_for"]
    torch.save(parts, path)


def write_harmful(path, found):
    path.write_bytes(pickle.dumps(Harmful(path.with_suffix(".harm"))))


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        write_nothing,
        write_weights,
        write_a_list,
        write_truncated,
        write_from_the_future,
        write_without_a_part,
        write_harmful,
    ],
)
def test_any_other_file_is_named_in_the_error(shared, tmp_path, write):
    path = tmp_path / "other.pt"
    write(path, shared)
    with pytest.raises(ValueError, match=r"other\.pt is not an initialisation of `metarefine meta-train`"):
        SharedInitialisation.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["other.pt"]


def test_a_format_of_the_future_is_named(shared, tmp_path):
    write_from_the_future(tmp_path / "new.pt", shared)
    with pytest.raises(ValueError, match="format 2"):
        SharedInitialisation.load(tmp_path / "new.pt")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"blocks": 3}, "blocks is 3 here and 2 there"),
        ({"hidden": 9}, "hidden is 9 here and 8 there"),
        ({"dimensions": 8, "blocks": 1}, "dimensions is 8 here and 16 there; blocks is 1 here and 2 there"),
        ({"layers": ["blocks.4"]}, "layers is "),
    ],
)
def test_a_model_of_another_size_is_refused_and_left_as_it_was(shared, size, expected):
    network = model(**size)
    before = {name: value.clone() for name, value in network.flow.state_dict().items()}
    with pytest.raises(ValueError, match=expected):
        shared.require_same(network.backbone, OFFLINE_BACKBONE, network.flow)
    torch.testing.assert_close(dict(network.flow.state_dict()), before, rtol=0, atol=0)


def test_another_backbone_is_refused_and_other_weights_of_the_same_are_not(shared):
    other = MetaRefineModel("resnet18", pre_trained=False, **SIZE)
    with pytest.raises(ValueError, match="backbone is 'resnet18' here and 'tf_efficientnet_lite0' there"):
        shared.require_same(other.backbone, "resnet18", other.flow)
    network = model()
    shared.require_same(network.backbone, OFFLINE_BACKBONE, network.flow)
    assert architecture(network.backbone, "tf_efficientnet_lite0.in1k", network.flow) == shared.made_for


def test_what_cannot_be_learned_from_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="at least one category"):
        learn([])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        learn([data[0], (tmp_path / "nowhere", None)])
    with pytest.raises(ValueError, match="'mamal'"):
        learn(data[:1], meta_algorithm="mamal")
