import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml

from anomalib_metarefine.benchmark.cells import LeftOut
from anomalib_metarefine.benchmark.table import ResultTable, read_results
from anomalib_metarefine.cli import main
from tests.benchmark.test_grid import FOUND, MODELS, parts_arguments
from tests.benchmark.test_table import ROW


@pytest.fixture
def config(parts):
    content = {
        "models": {"DFM": MODELS["DFM"]},
        "data": {
            "parts": {
                "class_path": "Folder", "init_args": parts_arguments(parts), "image_size": [64, 64], "train_images": 20
            }
        },
        "contamination": [0.0],
        "trainings": ["raw", "clean"],
        "seeds": [0, 1],
    }  # fmt: skip
    path = parts / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_killed_and_started_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_metarefine.benchmark.training_sets._LEAST_DEFECTIVE", 2)
    whole, killed = tmp_path / "whole.csv", tmp_path / "killed.csv"
    assert main(["bench", str(config), "--out", str(whole)]) == 0
    code = (
        "from anomalib_metarefine.benchmark import training_sets; training_sets._LEAST_DEFECTIVE = 2;"
        "from anomalib_metarefine.cli import main; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "bench", str(config), "--out", str(killed)])
    deadline = time.monotonic() + 120
    while not (killed.is_file() and len(killed.read_bytes().splitlines()) > 2):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(killed.read_bytes().splitlines()) - 1
    assert main(["bench", str(config), "--out", str(killed)]) == 0
    assert len(killed.read_bytes().splitlines()) - 1 == 4 > finished
    pd.testing.assert_frame_equal(read_results(killed)[FOUND], read_results(whole)[FOUND])


def test_what_it_prints(config, tmp_path, monkeypatch, capsys):
    def run(config, path, engine, retry):
        assert [one.init_args["root"] for one in config.data] == ["there"]
        assert config.seeds == (4,)
        yield ROW
        yield LeftOut("parts", "no such folder")

    monkeypatch.setattr("anomalib_metarefine.benchmark.grid.run", run)
    out = tmp_path / "new" / "bench.csv"
    assert main(["bench", str(config), "--out", str(out), "--root", "parts=there", "--seeds", "4"]) == 1
    said = capsys.readouterr()
    assert "2 cells, 0 of them" in said.out
    # Lines beside the progress bar go where the bar goes.
    assert "parts 20% seed 0 PaDiM, small, curated: image AUROC 0.900" in said.err
    assert "parts left out: no such folder" in said.err
    assert "bench-report" in said.out
    assert "not every data set" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "parts"], "DATA=DIR"),
        (["--root", "part=x"], "no data set 'part'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--models", "PaDim"], "no model 'PaDim'"),
        (["--address", "auto"], "belong to --engine ray"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config, tmp_path, capsys, arguments, message):
    assert main(["bench", str(config), "--out", str(tmp_path / "bench.csv"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_report_of_a_result_file(tmp_path, capsys):
    table = ResultTable(tmp_path / "bench.csv")
    table.append(ROW)
    assert main(["bench-report", str(table.path), "--out", str(tmp_path / "report")]) == 0
    assert "README.md" in capsys.readouterr().out
    assert "PaDiM, small" in (tmp_path / "report" / "README.md").read_text()
    assert main(["bench-report", str(tmp_path / "none.csv"), "--out", str(tmp_path / "report")]) == 2
    assert "Expected a result file" in capsys.readouterr().err
