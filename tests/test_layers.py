"""Rooms import downwards only: the contracts in pyproject.toml, and a proof that they see what they must."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    # The start-up hook would import the installed package before `folder` is looked at.
    environment = {**os.environ, "ANOMALIB_PLUGINS": "off", "PYTHONPATH": str(folder)}
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_layers_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("density/bad.py", "def lazy():\n    import anomalib_metarefine.curation.manifest\n"),
        (
            "images/bad.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import anomalib_metarefine.model\n",
        ),
        ("deploy/bad.py", "def lazy():\n    import torch\n"),
        ("refinement/bad.py", "import anomalib_metarefine.refinement.worse\n"),
        ("curation/bad.py", "import anomalib_metarefine.model.export\n"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path, room, code):
    shutil.copytree(ROOT / "anomalib_metarefine", tmp_path / "anomalib_metarefine")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "anomalib_metarefine" / room).write_text(code)
    (tmp_path / "anomalib_metarefine" / "refinement" / "worse.py").write_text(
        "def lazy():\n    import anomalib_metarefine.refinement.bad\n" if room.startswith("refinement") else ""
    )
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "bad" in done.stdout
