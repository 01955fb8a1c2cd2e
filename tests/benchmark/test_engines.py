import importlib.util
import math
import subprocess
import sys
from concurrent.futures import Future

import pandas as pd
import pytest
from PIL import Image

from anomalib_metarefine.benchmark import training
from anomalib_metarefine.benchmark.cells import LeftOut
from anomalib_metarefine.benchmark.engines import Processes, RayCluster, ThisProcess
from anomalib_metarefine.benchmark.grid import run
from anomalib_metarefine.benchmark.table import KEY, read_results
from tests.benchmark.test_grid import FOUND, MODELS, configured, oracle, parts_arguments

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")


def in_two_processes():
    return Processes(2)


def on_ray():
    return RayCluster(num_cpus=2, object_store_memory=100 * 2**20)


class Shared(ThisProcess):
    """This process, which works as if it were several, and says what memory was asked for."""

    slots = 2

    def __init__(self):
        self.asked = []

    def submit(self, call, memory_mb):
        self.asked.append(memory_mb)
        return super().submit(call, memory_mb)


@pytest.fixture
def masked(parts):
    """Enough defects, each with a mask."""
    for file in list((parts / "test/blob").iterdir()):
        for i in range(2):
            (parts / "masks").mkdir(exist_ok=True)
            mask = Image.new("L", Image.open(file).size)
            mask.paste(255, (10, 10, 30, 30))
            mask.save(parts / "masks" / f"{file.stem}{i}.png")
            Image.open(file).save(parts / "test/blob" / f"{file.stem}{i}.png")
        file.unlink()
    return parts


def data_sets(parts, *names, **changes):
    arguments = parts_arguments(parts) | {"mask_dir": "masks"}
    common = {"class_path": "Folder", "image_size": [64, 64], "train_images": 20}
    data = {name: common | {"init_args": arguments} for name in names}
    return configured(parts, data=data, **changes)


@pytest.mark.parametrize("engine", [in_two_processes, pytest.param(on_ray, marks=[needs_ray, pytest.mark.slow])])
def test_the_same_rows_wherever_cells_run_and_whatever_kills_them(masked, tmp_path, engine):
    marker = tmp_path / "killed"
    models = {
        "DFM": MODELS["DFM"],
        "hungry": {"class_path": "tests.benchmark.toys.Hungry", "init_args": {"marker": str(marker)}},
    }
    config = data_sets(masked, "parts", models=models, contamination=[0.2], trainings=["raw", "curated"])
    found = [*run(config, tmp_path / "there.csv", engine(), curator=oracle)]
    assert marker.exists()
    assert len(found) == 2 * 2
    assert [row.reason for row in found] == [""] * len(found)
    list(run(config, tmp_path / "here.csv", curator=oracle))
    here, there = (
        read_results(tmp_path / name).sort_values(KEY, ignore_index=True) for name in ("here.csv", "there.csv")
    )
    columns = [*FOUND, "pixel_AUROC", "pixel_AUPRO"]
    assert there.pixel_AUROC.notna().all()
    pd.testing.assert_frame_equal(here[columns], there[columns])
    assert (set(here.jobs), set(there.jobs)) == ({1}, {2})
    assert not list(tmp_path.glob(".there*"))  # the work folder
    assert list(run(config, tmp_path / "there.csv", ThisProcess(), curator=oracle)) == []


def test_features_and_curation_come_first_and_once(masked, tmp_path, monkeypatch):
    computed, curated = [], []
    train_and_test = training.train_and_test

    def watched(spec, *arguments):
        memo = arguments[-1]
        before = memo.seconds
        figures, rejected = train_and_test(spec, *arguments)
        computed.append(memo.seconds - before)
        assert figures["feature_seconds"] > 0
        return figures, rejected

    def curator(paths, *rest):
        curated.append(len(paths))
        return oracle(paths, *rest)

    monkeypatch.setattr(training, "train_and_test", watched)
    config = data_sets(masked, "left", "right", models={"PaDiM": MODELS["PaDiM"]}, contamination=[0.2])
    rows = list(run(config, tmp_path / "table.csv", Shared(), curator=curator))
    assert len(rows) == 2 * 3
    assert computed == [0] * len(rows)
    assert curated == [20, 20]


def test_a_model_that_cannot_be_built_spoils_no_other(masked, tmp_path):
    models = {"bad": MODELS["DFM"] | {"init_args": {"layer": "blocks.99"}}, "DFM": MODELS["DFM"]}
    config = data_sets(masked, "left", "right", models=models, contamination=[0.0], trainings=["raw"])
    rows = list(run(config, tmp_path / "table.csv", Shared(), curator=oracle))
    assert sorted((row.model, bool(row.reason)) for row in rows) == [("DFM", False)] * 2 + [("bad", True)] * 2


def test_memory_is_asked_for_as_measured_and_what_needs_more_runs_alone(masked, tmp_path, monkeypatch):
    trained = []

    def train_and_test(spec, *_):
        trained.append(spec.name)
        if spec.name == "DFM" and trained.count("DFM") < 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return {}, None

    peak = iter(range(1000, 2000))
    monkeypatch.setattr("anomalib_metarefine.benchmark.grid.peak_mb", lambda: next(peak))
    monkeypatch.setattr(training, "train_and_test", train_and_test)
    monkeypatch.setattr(training, "embed", lambda *_: None)
    engine = Shared()
    config = configured(masked, contamination=[0.2], trainings=["raw"], seeds=[0, 1])
    rows = list(run(config, tmp_path / "table.csv", engine, curator=oracle))
    # Features; two models of two seeds, the second PaDiM as the first was measured; DFM again, alone.
    assert engine.asked == [None, None, None, 1001, None, math.inf, math.inf]
    assert trained == ["PaDiM", "DFM", "PaDiM", "DFM", "DFM", "DFM"]
    assert [row.reason for row in rows] == [""] * 4

    def never_enough(*_):
        raise MemoryError("900 GB")

    monkeypatch.setattr(training, "train_and_test", never_enough)
    rows = list(run(config, tmp_path / "none.csv", Shared(), curator=oracle))
    assert {row.reason for row in rows} == {"MemoryError: 900 GB"}
    assert len(rows) == 4


def test_a_data_set_that_cannot_be_had_is_said_once(masked, tmp_path):
    config = data_sets(masked, "left", "right", models={"DFM": MODELS["DFM"]}, contamination=[0.2]).at(
        {"left": str(tmp_path / "no")}
    )
    found = list(run(config, tmp_path / "table.csv", Shared(), curator=oracle))
    assert sorted(one.data for one in found) == ["left", "right", "right", "right"]
    assert [one.data for one in found if isinstance(one, LeftOut)] == ["left"]


def test_an_engine_is_closed_when_nobody_wants_more(masked, tmp_path, monkeypatch):
    class Watched(ThisProcess):
        closed = False

        def close(self):
            self.closed = True

        def submit(self, call, memory_mb):
            done = Future()
            done.set_result((LeftOut("parts", "test"), 0))
            return done

    engine = Watched()
    steps = run(configured(masked), tmp_path / "table.csv", engine, curator=oracle)
    next(steps)
    steps.close()
    assert engine.closed


def test_ray_is_imported_only_when_asked_for():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from anomalib_metarefine.benchmark import grid\n"
        "from anomalib_metarefine.benchmark.engines import RayCluster\n"
        "try: RayCluster()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'anomalib-metarefine[ray]'" in said.stdout
