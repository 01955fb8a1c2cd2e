from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_metarefine.features import store as stores
from anomalib_metarefine.features.store import FeatureStore


def filled(limit_mb: float) -> FeatureStore:
    store = FeatureStore(limit_mb)
    for start in range(0, 60, 7):
        ids = range(start, min(start + 7, 60))
        store.add([f"{i}.png" for i in ids], torch.stack([torch.full((16, 8), float(i)) for i in ids]))
    return store


@pytest.mark.parametrize(("limit_mb", "on_disk"), [(100, False), (0.004, True), (0, True)])
def test_gives_back_what_was_added_in_memory_and_on_disk(limit_mb, on_disk):
    store = filled(limit_mb)
    assert store.on_disk is on_disk
    assert (len(store), store.shape, len(store.paths)) == (60, (16, 8), 60)
    torch.testing.assert_close(store.images()[:, 0, 0], torch.arange(60.0))
    torch.testing.assert_close(store.images([3, 59])[:, 5, 2], torch.tensor([3.0, 59.0]))


@pytest.mark.parametrize("limit_mb", [100, 0])
def test_samples_patches_of_all_images_once(limit_mb):
    store = filled(limit_mb)
    sample = store.sample_patches(10**6, torch.Generator())
    assert sample.shape == (60 * 16, 8)
    assert sample[:, 0].unique().numel() == 60
    assert store.sample_patches(100, torch.Generator()).shape == (100, 8)


def test_the_file_goes_with_the_store():
    store = filled(0)
    assert store.on_disk
    folder = store._folder.name
    assert Path(folder).exists()
    del store
    assert not Path(folder).exists()


def test_images_without_finite_features_are_left_out_and_named():
    store = FeatureStore()
    batch = torch.zeros(3, 4, 2)
    batch[1, 0, 0] = float("nan")
    batch[2, 3, 1] = 1e6  # past the range of half precision
    store.add(["a", "b", "c"], batch)
    assert store.paths == ["a"]
    assert set(store.left_out) == {"b", "c"}
    assert "not finite" in store.left_out["b"]


def test_images_of_another_size_are_refused():
    store = FeatureStore()
    store.add(["a"], torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="Images of different sizes"):
        store.add(["b"], torch.zeros(1, 9, 2))


@pytest.mark.parametrize("limit_mb", [100, 0])
def test_sorted_results_do_not_depend_on_the_order_of_arrival(limit_mb):
    forward, shuffled = FeatureStore(limit_mb), FeatureStore(limit_mb)
    names = [f"{i:02d}.png" for i in range(20)]
    features = torch.arange(20.0)[:, None, None].expand(20, 16, 8)
    forward.add(names, features)
    order = np.random.default_rng(0).permutation(20)
    for part in np.array_split(order, 3):
        shuffled.add([names[i] for i in part], features[part])
    for store in (forward, shuffled):
        store.sort()
    assert shuffled.paths == names
    torch.testing.assert_close(shuffled.images(), features)
    torch.testing.assert_close(shuffled.images([3, 19])[:, 0, 0], torch.tensor([3.0, 19.0]))
    samples = [store.sample_patches(50, torch.Generator().manual_seed(0)) for store in (forward, shuffled)]
    torch.testing.assert_close(*samples)
    torch.testing.assert_close(shuffled.of(["07.png", "02.png"]).images()[:, 0, 0], torch.tensor([7.0, 2.0]))


def test_a_sorted_store_takes_no_more_images():
    store = filled(100)
    store.sort()
    with pytest.raises(RuntimeError, match="The store is sorted"):
        store.add(["x.png"], torch.zeros(1, 16, 8))


def test_chunks_are_the_rows_asked_for_a_few_at_a_time():
    store, rows = filled(100), np.array([5, 3, 40, 41, 59])
    parts = list(store.chunks(rows, size=2))
    assert [part.tolist() for part, _ in parts] == [[5, 3], [40, 41], [59]]
    for part, embeddings in parts:
        torch.testing.assert_close(embeddings, store.images(part))
    assert list(store.chunks(rows[:0])) == []


def test_sorting_again_changes_nothing():
    store = filled(100)
    store.sort()
    paths, embeddings = list(store.paths), store.images()
    store.sort()
    assert store.paths == paths
    torch.testing.assert_close(store.images(), embeddings)


@pytest.mark.parametrize("limit_mb", [100, 0])
def test_what_one_run_finds_is_not_in_the_way_of_another(limit_mb):
    store = filled(limit_mb)
    one, other = store.fresh, store.fresh
    one.keep(found=np.zeros((60, 16)))
    other.keep(found=np.ones((60, 16)))
    assert not one.read("found").any()
    assert other.read("found", np.array([59, 3])).all()
    assert "found" not in store.shards[0]
    torch.testing.assert_close(one.images(), store.images())
    folder = store._folder
    del one, other, store
    if folder is not None:
        assert not list(Path(folder.name).glob("*/run-*"))


@pytest.mark.parametrize("limit_mb", [100, 0])
def test_however_images_are_cut_into_shards(limit_mb, monkeypatch):
    expected = filled(100)
    monkeypatch.setattr(stores, "SHARD", 16)
    found = filled(limit_mb)
    assert len(found.shards) == 4
    rows = np.array([59, 0, 16, 15, 40])
    torch.testing.assert_close(found.images(rows), expected.images(rows))
    assert found.paths == expected.paths
    samples = [store.sample_patches(50, torch.Generator().manual_seed(0)) for store in (found, expected)]
    torch.testing.assert_close(*samples)
    found.sort()
    expected.sort()
    assert [shard.read("embeddings").shape[0] for shard in found.shards] == [16, 16, 16, 12]
    torch.testing.assert_close(found.images(), expected.images())
