import pytest
import timm
import torch

from anomalib_metarefine.features.backbone import Backbone, normalization
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE, offline_state_dict, use_offline_weights


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", [128, 256]), ("mobilenetv3_small_050", [16, 24]), ("vit_tiny_patch16_224", [192, 192])],
)
@pytest.mark.parametrize("size", [(64, 64), (64, 160)])
def test_any_architecture_and_size(name, channels, size):
    maps = Backbone(name, pre_trained=False)(torch.zeros(2, 3, *size))
    assert [m.shape[1] for m in maps] == channels
    assert tuple(maps[-1].shape[-2:]) == (size[0] // 16, size[1] // 16)


def test_layers_by_name_in_order_of_depth():
    backbone = Backbone("resnet18", ["layer3", "layer1"], pre_trained=False)
    assert backbone.layers == ["layer1", "layer3"]


def test_offline_weights_are_those_of_the_package():
    maps = Backbone()(torch.zeros(1, 3, 64, 64))
    full = timm.create_model(OFFLINE_BACKBONE, pretrained=False, features_only=True, out_indices=(2, 3)).eval()
    full.load_state_dict({k: offline_state_dict()[k] for k in full.state_dict()})
    full.to(memory_format=torch.channels_last)  # another layout, another order of summation
    for ours, theirs in zip(maps, full(torch.zeros(1, 3, 64, 64)), strict=True):
        assert torch.equal(ours, theirs)


def test_channels_are_last_in_memory_all_the_way():
    for features in Backbone()(torch.zeros(2, 3, 64, 96)):
        assert features.is_contiguous(memory_format=torch.channels_last)


def test_offline_weights_serve_other_models_of_anomalib():
    from anomalib.models import Padim

    use_offline_weights()
    model = Padim(backbone=OFFLINE_BACKBONE, layers=["blocks.2", "blocks.4"], n_features=32)
    weights = model.model.feature_extractor.feature_extractor.state_dict()
    assert torch.equal(weights["conv_stem.weight"], offline_state_dict()["conv_stem.weight"])


def test_normalization_is_the_backbones_own():
    assert normalization(OFFLINE_BACKBONE) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalization("resnet18")[0] == (0.485, 0.456, 0.406)


def test_stays_frozen_and_in_evaluation_mode():
    backbone = Backbone("resnet18", pre_trained=False).train()
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())


def test_unknown_backbone_layer_and_missing_weights(monkeypatch):
    with pytest.raises(ValueError, match=r"no backbone 'resnet81'.*'resnet18'"):
        Backbone("resnet81")
    with pytest.raises(ValueError, match=r"no layer \['layer9'\].*'layer3'"):
        Backbone("resnet18", ["layer9"], pre_trained=False)

    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("connection refused")
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match="No pretrained weights for backbone 'resnet18'.*tf_efficientnet_lite0"):
        Backbone("resnet18")
