"""What runs on the line: alone, without torch and anomalib."""

import argparse
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anomalib_metarefine import deploy
from anomalib_metarefine.deploy.command import add_arguments, main
from tests.deploy.conftest import grey, save

ROOT = Path(__file__).parents[2]
BLOCKED = ("torch", "torchvision", "anomalib", "lightning", "timm")
MODULES = sorted(f"anomalib_metarefine.deploy.{module.name}" for module in pkgutil.iter_modules(deploy.__path__))
BLOCK = f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\n"


def project(file):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    return tomllib.loads((ROOT / file).read_text(encoding="utf-8"))


def run_blocked(code, *arguments):
    command = [sys.executable, "-c", BLOCK + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_module_is_imported_without_torch_and_anomalib():
    """In one process each: a module must not lean on what another has imported."""
    code = "import importlib, os\nfor name in sys.argv[1:]:\n"
    code += "    child = os.fork()\n    if not child:\n        importlib.import_module(name)\n        os._exit(0)\n"
    code += "    assert os.waitpid(child, 0)[1] == 0, name"
    assert len(MODULES) > 10
    done = run_blocked(code, *MODULES, "anomalib_metarefine.images.reading")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BLOCKED)
def test_the_block_blocks(name):
    assert run_blocked(f"import {name}").returncode == 1


def test_a_detector_without_torch_and_anomalib(brightness, tmp_path):
    code = "from anomalib_metarefine.deploy.detector import Detector\n"
    code += "from anomalib_metarefine.images.reading import read_image\n"
    code += "print(Detector(sys.argv[1]).predict(read_image(sys.argv[2]).pixels).decision)"
    done = run_blocked(code, brightness, save(tmp_path / "a.png", grey(200)))
    assert (done.returncode, done.stdout) == (0, "anomalous\n"), done.stderr


def test_watch_without_torch_and_anomalib(brightness, tmp_path):
    code = "from anomalib_metarefine.cli import main; sys.exit(main())"
    for name, level in (("a", 100), ("b", 200)):
        save(tmp_path / "in" / f"{name}.png", grey(level))
    out = tmp_path / "r.jsonl"
    arguments = ["watch", brightness, tmp_path / "in", "--out", out, "--once", "--heatmaps", tmp_path / "maps"]
    done = run_blocked(code, *arguments, "--dynamic-threshold", "9", "11")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(record["decision"] for record in records if "path" in record) == ["anomalous", "normal"]


def test_the_line_has_all_that_its_files_import(tmp_path, brightness):
    """The second distribution holds part of the package: nothing in it may need the rest."""
    content = project("line/pyproject.toml")
    for source, target in content["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        copy = shutil.copytree if (ROOT / "line" / source).is_dir() else shutil.copy
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / "line" / source, tmp_path / target)
    save(tmp_path / "in" / "a.png", grey(200))
    module, function = content["project"]["scripts"]["metarefine-watch"].split(":")
    code = f"import importlib; sys.exit(importlib.import_module({module!r}).{function}())"
    command = [sys.executable, "-c", BLOCK + code, brightness, "in", "--out", "r.jsonl", "--once"]
    alone = {**os.environ, "PYTHONPATH": str(tmp_path), "ANOMALIB_PLUGINS": "off"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"decision": "anomalous"' in (tmp_path / "r.jsonl").read_text()


def test_both_distributions_ask_for_the_same_versions():
    wanted, line = (set(project(file)["project"]["dependencies"]) for file in ("pyproject.toml", "line/pyproject.toml"))
    assert line < wanted


def test_a_wrong_argument_is_told_in_a_sentence(brightness, tmp_path, capsys):
    assert main([str(brightness), str(tmp_path / "none"), "--out", str(tmp_path / "r.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("metarefine-watch: There is no folder")


def test_what_the_line_offers_is_as_in_the_whole_package():
    wanted, line = (
        project(file)["project"]["optional-dependencies"] for file in ("pyproject.toml", "line/pyproject.toml")
    )
    assert line == {name: wanted[name] for name in ("serve", "mqtt", "metrics")}


def test_the_container_asks_for_what_there_is():
    content, text = project("line/pyproject.toml"), (ROOT / "configs/line/Dockerfile").read_text(encoding="utf-8")
    assert set(re.search(r"whl\)\[(.*?)\]", text)[1].split(",")) == set(content["project"]["optional-dependencies"])
    assert re.search(r'ENTRYPOINT \["(.*)"\]', text)[1] in content["project"]["scripts"]


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze")
    text = (ROOT / "configs/line/metarefine-watch.service").read_text(encoding="utf-8")
    program, *arguments = re.search(r"^ExecStart=(.*?)(?<!\\)$", text, re.M | re.S)[1].replace("\\\n", " ").split()
    unit = tmp_path / "metarefine-watch.service"
    unit.write_text(text.replace(program, sys.executable))  # it looks whether the program is there
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(program).name in project("line/pyproject.toml")["project"]["scripts"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(arguments).mqtt == "localhost:1883/line7/results"
