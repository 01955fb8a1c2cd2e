"""Every command block and every example of the guides, run in a folder where the guides' own names are."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anomalib.data import Folder
from anomalib.deploy import OpenVINOInferencer

from anomalib_metarefine import use_offline_weights
from anomalib_metarefine.cli import main
from anomalib_metarefine.deploy.command import main as watch_on_the_line
from anomalib_metarefine.images.reading import file_hash
from tests.conftest import part
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.slow
PAGES = [
    "curate",
    "train",
    "deployment",
    "threshold",
    "update",
    "watch",
    "models",
    "structure",
    "quality",
    "meta",
    "data",
]
NOT_OURS = {"pip", "python", "make"}  # what installs and builds
QUICKER = {"curate": "--settings meta_steps=1", "meta-train": "--settings meta_steps=1", "verify": "--runs 4"}
QUICKER["anomalib"] = "--model.meta_steps 1"


def run(*words):
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PATH": programs})
    assert done.returncode == 0, words[-1] + done.stdout[-2000:] + done.stderr[-2000:]


def images(folder, count, dirty=0, names="{:04d}.png"):
    rng = np.random.default_rng(len(str(folder)))
    folder.mkdir(parents=True)
    for i in range(count):
        part(rng, defect=i >= count - dirty).save(folder / names.format(i))


@pytest.fixture(scope="session")
def line(tmp_path_factory):
    """Images, a trained and exported model, what it said, and a person's verdicts."""
    root = tmp_path_factory.mktemp("guides")
    folders = {"line7/good": (44, 3), "line7/test/good": (4, 0), "line7/test/bad": (4, 4), "line7/normal": (24, 0)}
    folders |= {"new_parts": (3, 1), **{f"line7/{name}": (12, 0) for name in ("mono", "poly")}}
    folders |= {f"{name}/good": (8, 0) for name in ("line1", "line2", "line3")}
    for name, (count, dirty) in folders.items():
        images(root / name, count, dirty)
    shutil.copy(root / "line7/test/bad/0000.png", root / "part.png")
    (root / "line7/good/0017.png").rename(root / "line7/good/0417.png")
    small = ["--settings", "dimensions=32", "meta_steps=1"]
    assert main(["train", str(root / "line7/good"), "--out", str(root / "line7-model"), "--quiet", *small]) == 0
    shutil.copy(root / "line7-model/model.ckpt", root / "model.ckpt")
    shutil.copytree(root / "line7-model/weights", root / "weights")
    shutil.copytree(root / "line7-model/curation", root / "line7-curation")
    results = root / "line7.jsonl"
    assert (
        main(["watch", str(root / "weights/openvino"), str(root / "line7/test"), "--out", str(results), "--once"]) == 0
    )
    path = next(json.loads(text)["path"] for text in results.read_text().splitlines() if '"path"' in text)
    (root / "verdicts.csv").write_text(f"image_path,decision\n{path},missed\n")
    return root


@pytest.fixture
def here(line, tmp_path, monkeypatch):
    """A copy of it, in which a page's commands leave what they write."""
    place = tmp_path / "here"
    shutil.copytree(line, place, ignore=shutil.ignore_patterns("line7-model"))
    monkeypatch.chdir(place)
    use_offline_weights()  # for PatchCore
    return place


def shell(block, here):
    """Run the lines of a block; paths that only a line has are those of the toy, and a watch ends."""
    known = {
        "DATA": "line7/good",
        "DIR": "again-curation",
        "/data": "line7/test",
        "/data/line7": "line7/test",
        "9f86d081884c": file_hash(here / "line7/good/0003.png"),
    }
    for text in block.replace("\\\n", " ").splitlines():
        words = [known.get(word, word) for word in shlex.split(text, comments=True)]
        program = words[0] if words else "python"
        if program in NOT_OURS or "datasets/KolektorSDD2" in words:  # data that can't be had here
            continue
        if "|" in words:
            run("bash", "-ec", text.replace("/data ", "line7/test "))
            continue
        if "--out" in words and words[words.index("--out") + 1] in ("line.ckpt", "new.ckpt", "line7.jsonl"):
            Path(words[words.index("--out") + 1]).unlink(missing_ok=True)  # several lines show several ways to it
        if program == "anomalib":
            few = ["--data.train_images", "24", "--trainer.limit_test_batches", "1"] if "ELPV" in words else []
            run(*words, *few, *QUICKER["anomalib"].split())
            continue
        if "watch" in words[1] or program == "metarefine-watch":
            words += ["--once"] * ("--once" not in words)
        if words[:2] == ["metarefine", "review"]:
            words += ["--table", "--budget", "4"] * ("--decisions" not in words)  # else a page opens
        if program == "metarefine-watch":
            assert watch_on_the_line(words[1:]) == 0, text
        else:
            assert program == "metarefine", text
            assert main([*words[1:], *QUICKER.get(words[1], "").split()]) == 0, text
            if "--budget" in words and "--out" in words:  # what a person does
                table = pd.read_csv(words[words.index("--out") + 1], dtype=str)
                table.assign(decision="keep").to_csv(words[words.index("--out") + 1], index=False)


@pytest.mark.parametrize("page", PAGES)
def test_all_of_a_guide_runs(here, page):
    normal = sorted(Path("line7/normal").iterdir())
    if page == "models":  # of the model that its command trains
        normal = [path.resolve() for path in normal]
    names = {
        "paths": normal, "normal_images": normal, "scores": np.random.default_rng(0).normal(size=300), "score": 0.5,
        "my_datamodule": Folder("line7", root="line7", normal_dir="good", abnormal_dir="test/bad"),
        "OpenVINOInferencer": OpenVINOInferencer, "path": "weights/openvino/model.xml",
    }  # fmt: skip
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert (
        len(found)
        == len(blocks(ROOT / f"docs/{page}.md", "bash")) + len(blocks(ROOT / f"docs/{page}.md", "python"))
        > 0
    )
    for language, block in found:
        if language == "bash":
            shell(block, here)
        else:
            if '"Padim"' in block:
                shutil.copy("line7-padim/model.ckpt", "model.ckpt")
            offline = 'Patchcore(backbone="tf_efficientnet_lite0", layers=["blocks.2"], coreset_sampling_ratio=0.01)'
            exec(block.replace("Patchcore()", offline), names)
