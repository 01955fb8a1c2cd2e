"""What runs on the line: alone, without torch and anomalib."""

import json
import pkgutil
import subprocess
import sys

import pytest

from anomalib_metarefine import deploy
from tests.deploy.conftest import grey, save

BLOCKED = ("torch", "torchvision", "anomalib", "lightning", "timm")
MODULES = sorted(f"anomalib_metarefine.deploy.{module.name}" for module in pkgutil.iter_modules(deploy.__path__))
BLOCK = f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\n"


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
