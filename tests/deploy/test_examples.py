"""The programs under docs/examples, as a user runs them: without torch, anomalib or anything of ours."""

import shutil
import subprocess
import sys
from pathlib import Path

import openvino as ov
import pytest
from PIL import Image

from anomalib_metarefine.data.elpv import make_elpv_samples, packaged_root
from anomalib_metarefine.deploy.detector import Detector
from anomalib_metarefine.images.reading import read_image
from tests.deploy.conftest import grey, save

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BLOCKED = ("torch", "torchvision", "anomalib", "anomalib_metarefine", "lightning", "cv2", "pandas", "scipy")


def run_alone(script, *arguments):
    """Run an example where importing any of the blocked packages fails; what it printed, by rows."""
    code = f"import runpy, sys\nfor name in {BLOCKED}: sys.modules[name] = None\n"
    code += f"sys.argv = sys.argv[1:]\nrunpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def expected(folder, paths):
    detector = Detector(folder)
    return [detector.predict(read_image(path).pixels) for path in paths]


def test_plain_openvino_scores_like_the_detector(trained, tmp_path):
    paths = list(make_elpv_samples(packaged_root(), "mono").image_path[::150])
    Image.open(paths[0]).resize((420, 260)).convert("RGB").save(tmp_path / "other.jpg")
    paths.append(str(tmp_path / "other.jpg"))
    found = run_alone("plain_openvino.py", trained.folder, *paths)
    predictions = expected(trained.folder, paths)
    assert [row[0] for row in found] == paths
    assert [float(row[1]) for row in found] == pytest.approx([p.score for p in predictions], abs=2e-6)
    assert [row[2] for row in found] == [p.decision for p in predictions]


def test_plain_openvino_knows_uncertain(brightness, tmp_path):
    paths = [save(tmp_path / f"{level}.png", grey(level)) for level in (80, 125, 150)]
    assert [row[2] for row in run_alone("plain_openvino.py", brightness, *paths)] == [
        "normal",
        "uncertain",
        "anomalous",
    ]


def test_cpp_scores_like_the_detector(brightness, tmp_path):
    """Compiled where CMake, a compiler and stb are installed."""
    if not shutil.which("cmake") or not shutil.which("c++") or not list(Path("/usr/include").rglob("stb_image.h")):
        pytest.skip("needs cmake, c++ and stb_image.h")
    cmake = Path(ov.__file__).parent / "cmake"
    build = tmp_path / "build"
    for command in (["cmake", "-S", EXAMPLES, "-B", build, f"-DOpenVINO_DIR={cmake}"], ["cmake", "--build", build]):
        subprocess.run(command, check=True, capture_output=True)
    paths = [save(tmp_path / f"{level}.png", grey(level, size=(24, 30 + level))) for level in (80, 150)]
    (tmp_path / "broken.png").write_bytes(b"broken")
    command = [build / "detect", brightness, *paths, tmp_path / "broken.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "broken.png: " in done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    predictions = expected(brightness, paths)
    assert [float(row[1]) for row in rows] == pytest.approx([p.score for p in predictions], abs=2e-6)
    assert [row[2] for row in rows] == ["normal", "anomalous"]
