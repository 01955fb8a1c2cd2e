"""Passes over shards give the same results wherever they run, and survive a worker that is killed."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anomalib_metarefine.features import store as stores
from anomalib_metarefine.features.executors import InProcess, advance, make_executor
from anomalib_metarefine.features.shards import Shard
from anomalib_metarefine.features.store import FeatureStore


@pytest.fixture
def executor(request):
    if request.param == "ray":
        request.getfixturevalue("ray_here")
    return make_executor(request.param, 2)


@pytest.fixture
def embeddings():
    return torch.randn(50, 6, 4, generator=torch.Generator().manual_seed(0))


def store_in_files(embeddings: torch.Tensor, folder: Path, executor, size: int = 8) -> FeatureStore:
    store = FeatureStore(executor=executor)
    for start in range(0, len(embeddings), size):
        part = embeddings[start : start + size]
        shard = Shard(folder / str(start))
        shard.write(embeddings=part.half().numpy())
        store.append(shard, [f"{start + i:03d}.png" for i in range(len(part))], tuple(part.shape[1:]))
    return store


def largest(shard: Shard, factor: float, weights: np.ndarray) -> np.ndarray:
    found = shard.read("embeddings").astype(np.float32)
    shard.write(seen=found[:, 0])
    advance(len(found))
    return factor * weights * found.max((1, 2))


def sums(shard: Shard, power: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = shard.read("embeddings").astype(np.float32) ** power
    return found.sum(0), np.array(weights.sum())


def fails(shard: Shard, shared: None) -> None:
    raise ValueError("this image")


def dies_once(shard: Shard, marker: str, number: np.ndarray) -> np.ndarray:
    if 24 in number and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("executor", ["joblib", "ray"], indirect=True)
def test_every_executor_gives_what_this_process_gives(executor, embeddings, tmp_path):
    weights, only = np.arange(50.0), np.arange(50) > 20
    here, there = (
        store_in_files(embeddings, tmp_path / "a", InProcess()),
        store_in_files(embeddings, tmp_path / "b", executor),
    )
    told = {}
    found = {
        name: np.concatenate(store.map(largest, 2.0, weights, on_images=told.setdefault(name, []).append))
        for name, store in (("here", here), ("there", there))
    }
    np.testing.assert_array_equal(found["there"], found["here"])
    np.testing.assert_array_equal(found["here"], 2 * weights * embeddings.half().float().amax((1, 2)).numpy())
    assert {name: sum(images) for name, images in told.items()} == {"here": 50, "there": 50}
    np.testing.assert_array_equal(there.read("seen"), here.read("seen"))
    for one, other in zip(*(store.total(sums, 2, weights, only=only) for store in (here, there)), strict=True):
        assert torch.equal(one, other)  # to the last bit
    with pytest.raises(ValueError, match="this image"):
        there.map(fails)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
@pytest.mark.parametrize("executor", ["joblib", "ray"], indirect=True)
def test_a_killed_worker_costs_its_call_and_no_more(executor, embeddings, tmp_path):
    store = store_in_files(embeddings, tmp_path / "shards", executor)
    marker = tmp_path / "killed"
    found = store.per_image(dies_once, str(marker), np.arange(50))
    assert marker.exists()
    assert found.tolist() == list(range(50))


def test_sums_are_taken_in_parts_that_depend_on_the_images_only(embeddings, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_SUMS", 2)
    store = store_in_files(embeddings, tmp_path, InProcess())
    total, count = store.total(sums, 1, np.ones(50))
    torch.testing.assert_close(total, embeddings.half().double().sum(0))
    assert count == 50


def test_nothing_but_the_shards_asked_for_is_read(embeddings, tmp_path):
    store = store_in_files(embeddings, tmp_path, InProcess())
    (tmp_path / "0" / "embeddings.npy").unlink()
    assert len(store.map(largest, 1.0, np.ones(50), only=np.arange(50) > 8)) == 6


def test_says_what_is_wrong_with_an_engine(monkeypatch):
    with pytest.raises(ValueError, match="engine must be one of local, joblib, ray, found 'dask'"):
        make_executor("dask")
    with pytest.raises(ValueError, match="workers must be at least 1"):
        make_executor("joblib", workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'anomalib-metarefine\[ray\]'"):
        make_executor("ray")
