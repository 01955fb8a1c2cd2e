import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.density.patch_memory import PatchMemory, farthest_first, nearest


def radius(patches: torch.Tensor, chosen: torch.Tensor) -> float:
    """How far the worst patch lies from the chosen ones."""
    return torch.cdist(patches, patches[chosen]).amin(1).max().item()


@given(st.integers(1, 30), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_covers_all_patches_as_no_random_draw_does(count, seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(300, 32, generator=generator) * torch.rand(300, 1, generator=generator) ** -0.5
    chosen = farthest_first(patches, count, generator)
    assert len(chosen.unique()) == count
    drawn = [radius(patches, torch.randperm(300, generator=generator)[:count]) for _ in range(5)]
    assert radius(patches, chosen) <= 1.2 * min(drawn)  # distances are those of a random projection


def test_takes_all_of_few():
    generator = torch.Generator().manual_seed(0)
    assert farthest_first(torch.randn(7, 3), 20, generator).sort().values.tolist() == list(range(7))


def test_an_image_is_not_compared_with_itself():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 5, 3, generator=generator)
    numbers = torch.arange(4)[:, None].expand(4, 5)
    memory = PatchMemory.fit(patches.flatten(0, 1), numbers.flatten(), generator)
    found = memory.distances(patches, torch.tensor([0, 1, 2, -1]))
    others = torch.cdist(patches[0], patches[1:].flatten(0, 1)).amin(1) / 3**0.5
    torch.testing.assert_close(found[0], others, rtol=1e-4, atol=1e-4)
    assert (found[:3] > 0.01).all()
    assert (found[3] < 0.01).all()  # a new image that happens to be the same


def test_a_rare_patch_is_remembered():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(5000, 4, generator=generator)
    patches[1234] = 30
    memory = PatchMemory.fit(patches, torch.zeros(5000), generator)
    assert nearest(patches[1234], memory.patches) < 0.01
