import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_metarefine.features.resize import ExactPreProcessor, ExactResize


# Not to a width of 1: there torch 2.14 repeats the first of two rows where it should interpolate.
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.tuples(st.integers(1, 90), st.integers(2, 90)))
@settings(deadline=None)
def test_equals_the_antialiased_resize_of_torchvision(source, target):
    image = torch.rand(2, 3, *source)
    expected = Resize(target, antialias=True)(image)
    torch.testing.assert_close(ExactResize(target)(image), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(300, 300), (512, 200), (64, 64)])
def test_exported_pre_processing_equals_that_of_training(size):
    pre_processor = ExactPreProcessor(Compose([Resize((128, 96), antialias=True), Normalize([0.5] * 3, [0.25] * 3)]))
    image = torch.rand(1, 3, *size)
    torch.testing.assert_close(pre_processor(image), pre_processor.transform(image), atol=1e-5, rtol=1e-4)
    restored = ExactPreProcessor()
    restored.load_checkpoint_config(pre_processor.checkpoint_config())
    torch.testing.assert_close(restored(image), pre_processor(image))
