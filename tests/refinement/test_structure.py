import numpy as np
import pytest
import torch

from anomalib_metarefine.features.neighbours import NearestImages
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.refinement.structure import Structure, find_structure
from anomalib_metarefine.refinement.variants import folder_names, given_variants

GRID, CHANNELS = (6, 6), 12
PLACES = GRID[0] * GRID[1]


def structure_of(embeddings: torch.Tensor, kind: str = "auto", labels: list[str] | None = None) -> Structure:
    store = FeatureStore()
    store.add([f"{i:03d}" for i in range(len(embeddings))], embeddings)
    given = given_variants(labels) if labels else None
    neighbours = NearestImages(store, GRID, seed=0)
    return find_structure(neighbours, tail=0.05, seed=0, kind=kind, given=given)


def aligned(count: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """A product: every place has its look; some images are noisier than others."""
    generator = torch.Generator().manual_seed(seed)
    looks = 3 * torch.randn(PLACES, CHANNELS, generator=torch.Generator().manual_seed(7))
    noise = spread * torch.linspace(0.5, 1.5, count).view(-1, 1, 1)
    return looks + noise * torch.randn(count, PLACES, CHANNELS, generator=generator)


def test_an_aligned_product():
    found = structure_of(aligned(60))
    assert found.kind == "aligned"
    assert found.comparable
    assert found.layout > 0.5
    assert found.reliability > 0.5
    assert not found.variants.any()
    assert found.describe().startswith("One aligned product")


def test_parts_that_lie_anywhere():
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.randn(PLACES, CHANNELS, generator=generator).expand(24, -1, -1).clone()
    images += 0.05 * torch.randn(images.shape, generator=generator)
    part = 8 + 3 * torch.randn(CHANNELS, generator=generator)
    for image in images:  # which other image has the part at the same place decides
        image[torch.randint(PLACES, (1,), generator=generator)] = part
    found = structure_of(images)
    assert found.kind == "anywhere"
    assert found.layout > 0.3
    assert not found.comparable


def test_images_that_share_too_little():
    found = structure_of(torch.randn(60, PLACES, CHANNELS, generator=torch.Generator().manual_seed(0)))
    assert found.kind == "unlike"
    assert not found.comparable
    assert "too little" in found.describe()


@pytest.mark.parametrize("count", [5, 12, 25])
def test_a_variant_differs_everywhere_and_its_images_are_alike(count):
    looks = 4 * torch.randn(PLACES, CHANNELS, generator=torch.Generator().manual_seed(9))
    found = structure_of(torch.cat([aligned(100), looks + aligned(count, seed=1, spread=2.5)]))
    assert found.kind == "aligned"
    assert np.flatnonzero(found.variants).tolist() == list(range(100, 100 + count))
    assert found.describe().startswith(f"2 variants, of 100, {count} images")


def test_defects_are_no_variant():
    generator = torch.Generator().manual_seed(3)
    images = aligned(100)
    images[:20, :8] += 6  # the same defect, somewhere
    assert not structure_of(images).variants.any()
    images = aligned(100)
    images[:10] += 4 * torch.randn(10, PLACES, CHANNELS, generator=generator)  # everywhere, each in a way of its own
    assert not structure_of(images).variants.any()


def test_few_images_say_nothing_and_the_user_may_know_better():
    few = structure_of(aligned(19))
    assert few.kind == "aligned"
    assert np.isnan(few.reliability)
    assert few.summary()["reliability"] is None
    assert structure_of(aligned(60), "unlike").kind == "unlike"
    with pytest.raises(ValueError, match="structure must be auto or one of"):
        structure_of(aligned(30), "odd")


def lies_anywhere(count: int) -> torch.Tensor:
    """Which other image has the part at the same place decides how unusual an image looks."""
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.randn(PLACES, CHANNELS, generator=generator).expand(count, -1, -1).clone()
    images += 0.05 * torch.randn(images.shape, generator=generator)
    images[range(count), torch.randint(PLACES, (count,), generator=generator)] = 8
    return images


def test_halves_are_compared_within_variants():
    images = torch.cat([lies_anywhere(24), 20 * lies_anywhere(24)])  # of two products, one is the more varied
    found = structure_of(images)
    assert found.kind == "anywhere"
    assert found.describe().startswith("2 variants, of 24, 24 images. Parts that lie anywhere")
    found = structure_of(images, labels=["a"] * 24 + ["b"] * 24)
    assert found.kind == "anywhere"
    assert found.describe().startswith("2 variants, as given: a (24 images), b (24 images). Parts that lie anywhere")


def test_variants_are_named_by_what_differs_in_their_folders():
    assert folder_names(["/data/a.png"]) == ["data"]
    assert folder_names(["/data/x/a.png", "/data/b.png"]) == ["x", "."]
    assert folder_names(["/d/x/good/a.png", "/d/y/good/a.png"]) == ["x/good", "y/good"]


def test_each_variant_that_is_given_is_of_a_kind_of_its_own():
    strangers = 9 + 3 * torch.randn(60, PLACES, CHANNELS, generator=torch.Generator().manual_seed(0))
    images = torch.cat([aligned(70), strangers, lies_anywhere(24) - 20, aligned(6) + 30])
    labels = ["parts"] * 70 + ["prints"] * 60 + ["screws"] * 24 + ["few"] * 6
    found = structure_of(images, labels=labels)
    assert found.kinds == ("aligned", "unlike", "anywhere", "aligned")
    assert found.comparable
    assert np.flatnonzero(found.judged).tolist() == [*range(70), *range(154, 160)]
    said = "No image of these is judged, train them apart: prints: images that share too little, screws: parts that lie"
    assert said in found.describe()
    alone = structure_of(aligned(70))
    assert structure_of(images, "aligned", labels).judged.all()
    assert alone.judged.all()
    assert not structure_of(strangers).judged.any()


def test_products_in_one_folder_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    prints = 9 + 3 * torch.randn(60, PLACES, CHANNELS, generator=generator)
    screws, parts = lies_anywhere(24) - 20, aligned(70)
    found = structure_of(torch.cat([screws, parts, prints]))
    assert found.variants.tolist() == [2] * 24 + [0] * 70 + [1] * 60  # the largest first
    assert found.kinds == ("aligned", "unlike", "anywhere")
    said = "train them apart: variant 1: images that share too little, variant 2: parts that lie anywhere."
    assert found.describe().endswith(said)


def test_a_variant_is_found_within_its_product():
    looks = 4 * torch.randn(PLACES, CHANNELS, generator=torch.Generator().manual_seed(9))
    found = structure_of(torch.cat([aligned(100), looks + aligned(12, seed=1, spread=2.5), aligned(40) + 40]))
    assert found.variants.tolist() == [0] * 100 + [2] * 12 + [1] * 40
    assert found.comparable


def test_defects_are_no_product():
    images = aligned(100)
    images[:40] += 6 * (torch.arange(PLACES) < 8)[:, None]  # all alike, somewhere
    assert not structure_of(images).variants.any()
