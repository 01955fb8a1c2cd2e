import openvino as ov
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_metarefine.features.resize import ExactPreProcessor, ExactResize, usual_size

KINDS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


# Not to a width of 1: there torch 2.14 repeats the first of two rows where it should interpolate.
@pytest.mark.parametrize("bicubic", [False, True])
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)), target=st.tuples(st.integers(1, 90), st.integers(2, 90))
)
@settings(deadline=None)
def test_equals_the_antialiased_resize_of_torchvision(source, target, bicubic):
    image = torch.rand(2, 3, *source)
    expected = Resize(target, KINDS[bicubic], antialias=True)(image)
    torch.testing.assert_close(ExactResize(target, bicubic)(image), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(300, 300), (512, 200), (64, 64)])
def test_exported_pre_processing_equals_that_of_training(size, kind):
    resize = Resize((128, 96), InterpolationMode(kind), antialias=True)
    pre_processor = ExactPreProcessor(Compose([resize, Normalize([0.5] * 3, [0.25] * 3)]))
    image = torch.rand(1, 3, *size)
    torch.testing.assert_close(pre_processor(image), pre_processor.transform(image), atol=1e-5, rtol=1e-4)
    restored = ExactPreProcessor()
    restored.load_checkpoint_config(pre_processor.checkpoint_config())
    torch.testing.assert_close(restored(image), pre_processor(image))


def test_a_bicubic_graph_for_all_sizes_resizes_like_training():
    sizes = {2: torch.export.Dim("height", min=2, max=4096), 3: torch.export.Dim("width", min=2, max=4096)}
    program = torch.onnx.export(
        ExactResize((64, 96), bicubic=True).eval(), (torch.rand(1, 3, 90, 70),), dynamo=True, verbose=False,
        dynamic_shapes=(sizes,), input_names=["input"], opset_version=18,
    )  # fmt: skip
    core = ov.Core()
    network = core.compile_model(
        core.read_model(program.model_proto.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for size in [(200, 300), (40, 50), (64, 96)]:
        image = torch.rand(1, 3, *size)
        expected = Resize((64, 96), InterpolationMode.BICUBIC, antialias=True)(image)
        torch.testing.assert_close(torch.from_numpy(network(image.numpy())[0]), expected, atol=1e-4, rtol=1e-3)


def test_headers_of_a_thousand_tell_the_shape_of_many(monkeypatch):
    read = []

    def header_size(path):
        read.append(path)
        return (100, 400)

    monkeypatch.setattr("anomalib_metarefine.features.resize.header_size", header_size)
    assert usual_size([f"{i}.png" for i in range(5000)]) == (128, 512)
    assert sorted(read) == sorted(f"{i}.png" for i in range(0, 5000, 5))  # in threads, in any order
    assert usual_size([]) == (256, 256)
