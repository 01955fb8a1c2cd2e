"""The same decisions in this process, in several, and on Ray; a run that was killed goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from anomalib_metarefine.curation.curate import curate
from anomalib_metarefine.features import extract, neighbours
from anomalib_metarefine.features import store as stores
from tests.conftest import part

SMALL = {
    "rule": "share:0.14",
    "image_size": (64, 64),
    "dimensions": 16,
    "hidden": 8,
    "meta_steps": 1,
    "adaptation_steps": 1,
    "batch_patches": 64,
}
SHARD = 16


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """60 good parts, 10 defective ones, and a file that is no image."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("line")
    for i in range(70):
        part(rng, (64, 64), defect=i % 7 == 6).save(root / f"{i:02d}.png")
    (root / "35a.png").write_text("not an image")
    return root


@pytest.fixture
def small_shards(monkeypatch):
    for module in (stores, extract):
        monkeypatch.setattr(module, "SHARD", SHARD)


@pytest.fixture(scope="module")
def expected(dirty):
    """In this process and memory, in one shard."""
    return curate(dirty, progress=False, **SMALL)


def assert_same(found, expected):
    """But for rounding: batches of the backbone end where shards do, and workers have fewer threads."""
    pd.testing.assert_frame_equal(
        found.manifest.table.drop(columns="reason"),
        expected.manifest.table.drop(columns="reason"),
        rtol=0.01,
        atol=0.01,
    )
    for name in ("paths", "nearest", "groups", "unusual_in", "images"):
        assert getattr(found.evidence, name) == getattr(expected.evidence, name)
    np.testing.assert_allclose(found.evidence.maps, expected.evidence.maps, rtol=1e-2, atol=1e-2)


def test_however_the_images_are_cut_into_shards(dirty, expected, small_shards):
    assert_same(curate(dirty, progress=False, **SMALL), expected)


@pytest.mark.parametrize("engine", ["joblib", "ray"])
def test_every_engine_decides_the_same(dirty, expected, small_shards, tmp_path, engine, request):
    if engine == "ray":
        request.getfixturevalue("ray_here")
    found = curate(dirty, progress=False, engine=engine, workers=2, work=tmp_path / "work", **SMALL)
    assert_same(found, expected)
    assert len(list((tmp_path / "work").glob("*/embeddings.npy"))) == 5


def test_a_cluster_needs_a_folder_that_all_see(dirty):
    with pytest.raises(ValueError, match=r"needs a folder for features that all its machines see.*--work"):
        curate(dirty, engine="ray", address="auto", progress=False, **SMALL)


def test_what_was_finished_is_not_done_again(dirty, small_shards, tmp_path, monkeypatch):
    first = curate(dirty, progress=False, work=tmp_path, **SMALL)
    lost = sorted(tmp_path.glob("*/embedded.json"))[1].parent
    for file in lost.iterdir():
        file.unlink()
    done = {"embedded": 0, "compared": 0}
    batches, squared = extract._batches, neighbours._squared

    def count(name, function):
        def counted(*given):
            done[name] += 1
            return function(*given)

        return counted

    monkeypatch.setattr(extract, "_batches", count("embedded", batches))
    monkeypatch.setattr(neighbours, "_squared", count("compared", squared))
    again = curate(dirty, progress=False, work=tmp_path, **SMALL)
    assert done == {"embedded": 1, "compared": 1}
    pd.testing.assert_frame_equal(again.manifest.table, first.manifest.table)
    curate(dirty, progress=False, work=tmp_path, seed=1, **SMALL)
    assert done == {"embedded": 1, "compared": 6}  # against other images
    image = dirty / "00.png"
    before = image.read_bytes()
    try:
        part(np.random.default_rng(5), (64, 64)).save(image)
        curate(dirty, progress=False, work=tmp_path, **SMALL)
    finally:
        image.write_bytes(before)
    assert done["embedded"] == 2  # the shard with a changed file


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_killed_run_goes_on_from_what_it_had_finished(dirty, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    settings = [f"{name}={value}" for name, value in SMALL.items() if name != "image_size"]
    script = f"from anomalib_metarefine.features import extract, store\nextract.SHARD = store.SHARD = {SHARD}\n"
    script += "from anomalib_metarefine.cli import main\nmain()"
    command = [sys.executable, "-c", script, "curate", str(dirty), "--out", str(out), "--engine", "joblib"]
    command += ["--workers", "2", "--work", str(work), "--image-size", "64", "64", "--settings", *settings]
    root = Path(__file__).parents[2]
    running = subprocess.Popen(command, cwd=root, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(work.glob("*/embedded.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)  # the driver and its workers
    running.wait()
    finished = {
        file: file.stat().st_mtime_ns
        for file in work.glob("*/embeddings.npy")
        if (file.parent / "embedded.json").exists()
    }
    assert finished
    assert not (out / "manifest.csv").exists()
    subprocess.run(command, cwd=root, check=True)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert (out / "manifest.csv").exists()
