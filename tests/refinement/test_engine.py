import numpy as np
import pytest
import torch
from rich.progress import Progress

from anomalib_metarefine.density.patch_density import new_flow, trainable
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.refinement.engine import Result, refine_images
from anomalib_metarefine.refinement.fitting import Images, fit_density, fit_gaussian, fit_whitening
from anomalib_metarefine.settings import Settings

GRID, CHANNELS = (5, 6), 10
PLACES = GRID[0] * GRID[1]
SMALL = {"dimensions": 6, "hidden": 8, "meta_steps": 1, "batch_patches": 64, "adaptation_steps": 1}


def embeddings(count: int, dirty: int = 0, strength: float = 6.0) -> torch.Tensor:
    """Aligned images of more or less noise; the first ``dirty`` have the same kind of defect, somewhere."""
    generator = torch.Generator().manual_seed(0)
    places = 3 * torch.randn(PLACES, CHANNELS, generator=generator)
    noise = torch.linspace(0.5, 1.5, count)[torch.randperm(count, generator=generator)].view(-1, 1, 1)
    images = places + noise * torch.randn(count, PLACES, CHANNELS, generator=generator)
    defect = strength * torch.randn(CHANNELS, generator=generator)
    for image in range(dirty):
        row, column = image % (GRID[0] - 1), image % (GRID[1] - 1)
        for down, right in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            images[image, (row + down) * GRID[1] + column + right] += defect
    return images


def store_of(images: torch.Tensor, order: list[int] | None = None) -> FeatureStore:
    order = list(range(len(images))) if order is None else order
    store = FeatureStore()
    store.add([f"{i:03d}.png" for i in order], images[order])
    store.sort()
    return store


def refined(images: torch.Tensor | FeatureStore, seed: int = 0, answers=None, start=None, looked=None, **changes):
    store = images if isinstance(images, FeatureStore) else store_of(images)
    settings = Settings(**SMALL | changes)
    return refine_images(
        store, GRID, settings, seed, Progress(disable=True), answers=answers, start=start, looked=looked
    )


def maps(found: Result) -> torch.Tensor:
    return torch.from_numpy(found.images.store.read("maps"))


def usual(found: Result) -> np.ndarray:
    return found.images.store.read("usual")


def test_the_default_rule_finds_a_defect_that_recurs_and_rejects_nothing_of_a_clean_set():
    found = refined(embeddings(100, dirty=12))
    assert np.flatnonzero(~found.kept).tolist() == list(range(12))
    assert found.refinement.rejected == [f"{i:03d}.png" for i in np.argsort(-found.scales.scores)[:12]]
    assert refined(embeddings(100)).kept.all()


def test_neither_the_order_of_the_images_nor_what_ran_before_matters():
    images = embeddings(40, dirty=4)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = refined(images, rule="count:4")
    assert torch.rand(1) == expected  # the caller's random numbers are left alone
    again = refined(store_of(images, np.random.default_rng(0).permutation(40).tolist()), rule="count:4")
    assert first.refinement == again.refinement
    torch.testing.assert_close(maps(first), maps(again))
    assert not torch.equal(maps(first), maps(refined(images, seed=1, rule="count:4")))


def test_what_is_rejected_leaves_no_trace():
    images = embeddings(40, dirty=4)
    found = refined(images, rule="count:4")
    assert np.flatnonzero(~found.kept).tolist() == [0, 1, 2, 3]
    other = images.clone()
    other[:4] = 99.0
    flow, settings = found.density.flow, Settings(**SMALL)
    first, second = (
        fit_density(
            Images(store_of(some), found.images.whitening, GRID), found.kept, None, flow, trainable(flow),
            settings, 0,
        )
        for some in (images, other)
    )  # fmt: skip
    torch.testing.assert_close(first.gaussians[0].precision_root, second.gaussians[0].precision_root)
    torch.testing.assert_close(first.parameters, second.parameters)


def test_a_persons_answers_hold_and_teach():
    images = embeddings(60, dirty=10, strength=1.5)
    alone = refined(images, rule="share:0")
    told = refined(images, rule="share:0", answers={0: False, 1: False, 2: False, 59: True})
    assert np.flatnonzero(~told.kept).tolist() == [0, 1, 2]
    rank = [np.argsort(np.argsort(-found.scales.scores))[3:10].mean() for found in (alone, told)]
    assert rank[1] < rank[0]  # images like those that were rejected come sooner


def test_regions_are_left_out_of_what_is_kept():
    images = embeddings(90, dirty=4, strength=4.0)
    found = refined(images, rule="share:0")
    assert found.kept.all()
    assert 4 * 4 / (90 * PLACES) <= found.refinement.unusual_patches < 0.1
    assert not usual(found)[0, [0, 1, GRID[1], GRID[1] + 1]].any()
    fewer = refined(images, rule="count:2").refinement  # of the two others
    assert 0 < fewer.unusual_patches < found.refinement.unusual_patches
    for changes in ({"rule": "share:0", "patch_fence": 0.0}, {"rounds": 0}, {"structure": "anywhere"}):
        assert refined(images, **changes).refinement.unusual_patches == 0
    assert refined(images[:79], rule="share:0").refinement.unusual_patches == 0  # too few to tell


def test_without_rounds_images_are_not_compared():
    found = refined(embeddings(30, dirty=3), rounds=0)
    assert found.kept.all()
    assert set(found.scales.parts) == {"likelihood"}
    assert found.refinement.stop_reason == "off"
    assert found.scales.likeness is None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_images_is_enough(count):
    found = refined(embeddings(count))
    assert found.kept.all()
    assert maps(found).isfinite().all()
    assert np.isfinite(found.scales.scores).all()


def test_flat_images_are_no_error():
    found = refined(torch.zeros(5, PLACES, CHANNELS))
    assert found.kept.all()
    assert maps(found).isfinite().all()


def test_a_meta_learned_start_is_taken():
    store = store_of(embeddings(30))
    flow = new_flow(CHANNELS, 6, 4, 8, seed=5)
    parameters = {name: (value + 0.3).detach().requires_grad_() for name, value in trainable(flow).items()}
    start = (fit_whitening([store], 6, seed=1), flow, parameters)
    found = refined(store, start=start, adaptation_steps=0)
    assert found.density.flow is flow
    for name, value in parameters.items():
        torch.testing.assert_close(found.density.parameters[name], value)


def test_fitted_patches_are_scored_as_if_left_out():
    images = embeddings(30)
    found = refined(images, rule="count:3", adaptation_steps=0)
    fitted = torch.from_numpy(found.kept)
    whitened = found.images.whitening(found.images.store.images())
    as_they_are = found.density.score(whitened, found.images.positions)
    torch.testing.assert_close(maps(found)[~fitted], as_they_are[~fitted])
    assert (maps(found)[fitted] != as_they_are[fitted]).all()


def in_folders(*parts: tuple[str, torch.Tensor]) -> FeatureStore:
    store = FeatureStore()
    for name, images in parts:
        store.add([f"line/{name}/{i:03d}.png" for i in range(len(images))], images)
    store.sort()
    return store


def test_each_folder_has_statistics_of_its_own_and_images_go_to_those_they_fit():
    parts = [embeddings(30), embeddings(12).flip(1) + 4]
    found = refined(in_folders(("a", parts[0]), ("b", parts[1])), variants="folders", rule="share:0")
    assert found.structure.names == ("a", "b")
    assert "2 variants, as given: a (30 images), b (12 images)" in found.refinement.structure
    everyone = np.ones(12, dtype=bool)
    alone = fit_gaussian(Images(store_of(parts[1]), found.images.whitening, GRID), everyone, None, 0.2)
    torch.testing.assert_close(found.density.gaussians[1].mean, alone.mean)
    torch.testing.assert_close(found.density.gaussians[1].precision_root, alone.precision_root)
    whitened = found.images.whitening(found.images.store.images())
    assert found.density.variants_of(whitened, torch.full((42, PLACES), -1)).tolist() == [0] * 30 + [1] * 12
    as_they_are = found.density.score(whitened, found.images.positions)
    assert (maps(found) > as_they_are).float().mean() > 0.9  # as if left out


def test_a_variant_of_less_than_five_images_is_not_learned():
    store = in_folders(("a", embeddings(30)), ("b", embeddings(4).flip(1) + 4), ("c", embeddings(5) - 4))
    found = refined(store, variants="folders", rule="share:0")
    assert "4 kept images of variants of fewer than 5 can't be learned" in found.refinement.structure
    assert found.images.groups(found.kept).tolist() == [0] * 30 + [-1] * 4 + [1] * 5
    assert [int(gaussian.count[0]) for gaussian in found.density.gaussians] == [30, 5]
    small = refined(in_folders(("a", embeddings(4)), ("b", embeddings(3))), variants="folders")
    assert [int(gaussian.count[0]) for gaussian in small.density.gaussians] == [7]  # better than none


def test_a_column_may_say_what_belongs_together():
    store = store_of(torch.cat([embeddings(10), embeddings(6).flip(1) + 4]))
    labels = ["left"] * 10 + ["right"] * 6
    settings = Settings(**SMALL, variants="column")
    found = refine_images(store, GRID, settings, 0, Progress(disable=True), labels=labels)
    assert found.structure.names == ("left", "right")
    assert len(found.density.gaussians) == 2
    with pytest.raises(ValueError, match="needs a table of images with a column `variant`"):
        refined(store, variants="column")


def test_one_folder_is_one_product():
    images = embeddings(30, dirty=4)
    one, off = (refined(in_folders(("a", images)), variants=setting) for setting in ("folders", "off"))
    torch.testing.assert_close(maps(one), maps(off))
    assert one.refinement.kept == off.refinement.kept


def test_regions_are_left_out_variant_by_variant():
    images = embeddings(90, dirty=4)
    alone = refined(images, variants="off", rule="share:0")
    few = embeddings(30).flip(1) + 4
    both = refined(in_folders(("a", images), ("b", few)), variants="folders", rule="share:0")
    assert 0 < (~usual(both)[:90]).sum() < 2 * (~usual(alone)).sum()
    assert usual(both)[90:].all()


def test_images_of_a_variant_that_cannot_be_compared_are_not_judged():
    strangers = 9 + 3 * torch.rand(60, PLACES, CHANNELS, generator=torch.Generator().manual_seed(0))
    strangers[:6, :2] += 6 * torch.randn(CHANNELS, generator=torch.Generator().manual_seed(1))
    store = in_folders(("a", embeddings(100, dirty=12)), ("b", strangers))
    found = refined(store, variants="folders")
    assert found.structure.kinds == ("aligned", "unlike")
    assert np.flatnonzero(~found.kept).tolist() == list(range(12))
    assert np.isnan(found.scales.likeness[100:]).all()
    assert usual(found)[100:].all()


def anywhere(count: int, odd: int) -> torch.Tensor:
    """The same part in every image, at a place of its own; in each of the first ``odd`` it has a look of its own."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(count, PLACES, CHANNELS, generator=generator)
    look = 6 * torch.randn(2, CHANNELS, generator=generator)
    for number, image in enumerate(images):
        corner = int(torch.randint(PLACES - 8, (), generator=generator))
        image[corner : corner + 4] += look[0]
        image[corner + 4 : corner + 6] += 6 * torch.randn(CHANNELS, generator=generator) if number < odd else look[1]
    return images


def test_parts_that_lie_anywhere_are_scored_by_a_memory():
    images = anywhere(60, odd=5)
    found = refined(images)
    assert not found.structure.comparable
    assert list(found.scales.parts) == ["memory"]
    assert found.kept.all()
    assert set(np.argsort(-found.scales.scores)[:5]) == set(range(5))
    np.testing.assert_allclose(
        found.likelihood, found.scales.parts["memory"]
    )  # the last round's memory is the final one
    whitened, positions = found.images.whitening(images[:1]), found.images.positions
    assert maps(found)[0].max() > 3 * found.density.score(whitened, positions).max()  # which has the image itself
    assert refined(images, structure="aligned").density.memory is None


def test_what_is_rejected_is_not_in_the_memory():
    found = refined(anywhere(60, odd=5), answers={0: False, 7: True})
    assert not found.kept[0]
    remembered = set(found.density.memory.images.tolist())
    assert 0 not in remembered
    assert 7 in remembered


def test_what_lies_in_ignored_places_changes_nothing():
    looked = np.ones(PLACES, dtype=bool)
    looked[:6] = looked[11] = False
    images = embeddings(100, dirty=12)
    found = refined(images[:, looked], looked=looked, patch_fence=1.0)
    assert maps(found).shape == usual(found).shape == (100, PLACES - 7)
    assert np.flatnonzero(~found.kept).tolist() == list(range(12))
    pictures = found.images.places.on_grid(maps(found).numpy(), -1.0)
    assert pictures.shape == (100, *GRID)
    assert (pictures[:, 0] == -1).all()
    assert (pictures[:, 1, 5] == -1).all()
    np.testing.assert_array_equal(pictures.reshape(100, -1)[:, looked], maps(found).numpy())


def test_to_ignore_no_place_is_to_look_at_all():
    images = embeddings(100, dirty=12)
    everywhere = np.ones(PLACES, dtype=bool)
    one, other = (refined(images, looked=looked, rule="count:0") for looked in (None, everywhere))
    assert one.refinement == other.refinement
    assert one.refinement.unusual_patches > 0
