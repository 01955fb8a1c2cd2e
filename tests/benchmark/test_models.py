import json

import pytest
import torch
from anomalib.models import Patchcore
from anomalib.models.components.filters import GaussianBlur2d
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.benchmark.memo import Memo, MemoisedFeatures
from anomalib_metarefine.benchmark.metrics import ScoreEvaluator
from anomalib_metarefine.benchmark.models import ModelSpec, build, without_shortcuts
from anomalib_metarefine.benchmark.separable import SeparableBlur
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.features.resize import ExactPreProcessor

LAYERS = ["blocks.2", "blocks.4"]
SIZE = (64, 96)


def made(class_path, memo=None, layers=LAYERS, **init_args):
    return build(ModelSpec("a model", class_path, init_args), OFFLINE_BACKBONE, layers, SIZE, memo)


def transforms(model):
    resize, *rest = model.pre_processor.transform.transforms
    assert isinstance(resize, Resize)
    assert tuple(resize.size) == SIZE
    return rest


def test_settings_are_everything_but_the_name():
    spec = ModelSpec("PatchCore", "Patchcore", {"num_neighbors": 3}, max_steps=7)
    assert json.loads(spec.settings) == {
        "class_path": "Patchcore", "init_args": {"num_neighbors": 3}, "batch_size": 32, "max_epochs": None,
        "max_steps": 7,
    }  # fmt: skip
    assert ModelSpec("x", "Padim", {"a": 1, "b": 2}).settings == ModelSpec("y", "Padim", {"b": 2, "a": 1}).settings


@pytest.mark.parametrize(
    ("class_path", "read"),
    [
        ("Padim", lambda model: model.layers),
        ("Patchcore", lambda model: model.layers),
        ("anomalib.models.Cflow", lambda model: model.pool_layers),
        ("anomalib_metarefine.MetaRefine", lambda model: model.backbone.layers),
        ("studies.baselines.fastflow.FastflowOnFeatures", lambda model: model.feature_extractor.layers),
        ("studies.baselines.softpatch.SoftPatch", lambda model: model.layers),
    ],
)
def test_all_share_the_backbone(class_path, read):
    arguments = {"n_features": 10} if class_path == "Padim" else {}
    model = made(class_path, **arguments)
    assert list(read(model.model)) == LAYERS
    (normalize,) = transforms(model)
    assert (normalize.mean, normalize.std) == ([0.5] * 3, [0.5] * 3)  # as this backbone was trained
    assert isinstance(model.evaluator, ScoreEvaluator)
    assert model.post_processor is model.visualizer is None


def test_a_model_of_one_layer_takes_the_last():
    assert made("Dfm").model.layer == "blocks.4"
    assert made("Dfm", layer="blocks.2").model.layer == "blocks.2"


def test_layers_by_stride():
    assert made("Patchcore", layers=None).model.layers == LAYERS


def test_a_model_with_a_backbone_of_its_own():
    model = made("Patchcore", backbone="resnet18", pre_trained=False)
    assert list(model.model.layers) == ["layer2", "layer3"]
    (normalize,) = transforms(model)
    assert normalize.mean == pytest.approx([0.485, 0.456, 0.406])


def test_a_model_without_backbone_keeps_its_pre_processing():
    assert transforms(made("EfficientAd")) == []
    assert any(isinstance(part, Normalize) for part in transforms(made("Ganomaly")))


def test_metarefine_keeps_its_pre_processor():
    model = made("MetaRefine", rounds=0)
    assert isinstance(model, MetaRefine)
    assert isinstance(model.pre_processor, ExactPreProcessor)
    own = MetaRefine(image_size=SIZE, evaluator=False, visualizer=False)
    image = torch.rand(1, 3, 90, 70)
    assert torch.equal(model.pre_processor(image), own.pre_processor(image))
    assert torch.equal(model.pre_processor.transform(image), own.pre_processor.transform(image))


def test_names_of_models():
    assert type(made("Patchcore")) is Patchcore
    for wrong in ("Padum", "nowhere.Padim", "anomalib.models.Padum"):
        with pytest.raises(ValueError, match=f"There is no model '{wrong}'"):
            made(wrong)
    with pytest.raises(ValueError, match="not an anomalib model"):
        made("torch.nn.Linear")


def test_what_cannot_be_built_says_so():
    with pytest.raises(ValueError, match=f"ReverseDistillation can't be built on {OFFLINE_BACKBONE}: Decoder"):
        made("ReverseDistillation")
    with pytest.raises(ValueError, match="Padim can't be built.*n_features must be specified"):
        made("Padim")
    with pytest.raises(ValueError, match="Patchcore can't be built.*'no_such_setting'"):
        made("Patchcore", no_such_setting=1)


def test_shortcuts_come_and_go():
    model = made("Patchcore", Memo())
    network, blur = model.model.feature_extractor.feature_extractor, model.model.anomaly_map_generator.blur
    assert isinstance(network.forward, MemoisedFeatures)
    assert isinstance(blur.forward, SeparableBlur)
    with without_shortcuts(model):
        assert not isinstance(network.forward, MemoisedFeatures)
        assert not isinstance(blur.forward, SeparableBlur)
    assert isinstance(network.forward, MemoisedFeatures)
    assert isinstance(blur.forward, SeparableBlur)
    assert not vars(made("Patchcore").model.anomaly_map_generator.blur).get("forward")


def test_the_separable_blur_is_the_blur():
    blur = GaussianBlur2d(kernel_size=(33, 33), sigma=(4, 4), channels=1)
    maps = torch.rand(2, 1, 40, 72) * 30
    torch.testing.assert_close(SeparableBlur(blur)(maps), blur(maps), atol=1e-4, rtol=1e-5)
