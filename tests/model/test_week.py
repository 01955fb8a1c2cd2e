"""A week of a line in small: a lot change, false alarms, a missed defect, updates of which one is killed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_metarefine.cli import main
from anomalib_metarefine.deploy.history import read_results
from anomalib_metarefine.deploy.sidecar import read_sidecar
from anomalib_metarefine.images.reading import file_hash
from anomalib_metarefine.model.checkpoints import load_checkpoint
from tests.conftest import part

_KILLED = """
import os, signal, sys, torch
from anomalib_metarefine.cli import main

def half(content, path):
    path.write_bytes(b"half a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
main(sys.argv[1:])
"""


def arrive(folder, rng, count, lot=0.0, defects=()):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.asarray(part(rng, defect=i in defects), dtype=np.float32)
        pixels[:16, :16] += lot
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{len(list(folder.iterdir())):03d}.png")


def images_of(results):
    return [line for line in read_results(results) if "path" in line]


def export(checkpoint, folder):
    assert main(["export", str(checkpoint), "--out", str(folder), "--format", "onnx", "--quiet"]) == 0
    return folder / "weights/onnx"


def watch(model, folder, results):
    options = ["--once", "--settle", "0", "--out", str(results)]
    assert main(["watch", str(model), str(folder), *options, "--quiet"]) == 0


def update(checkpoint, *options, out):
    """Killed in the middle, then done."""
    arguments = ["update", str(checkpoint), *map(str, options), "--out", str(out), "--quiet"]
    before = file_hash(checkpoint)
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not out.exists()
    assert file_hash(checkpoint) == before
    assert main(arguments) == 0
    load_checkpoint(out)


@pytest.mark.slow
def test_a_week_of_a_line(line, checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(7)
    belt, results, verdicts = tmp_path / "belt", tmp_path / "line7.jsonl", tmp_path / "verdicts.csv"
    first = shutil.copy(checkpoint, tmp_path / "monday.ckpt")
    monday = export(first, tmp_path / "monday")
    arrive(belt, rng, 12, defects=(3,))
    watch(monday, belt, results)
    arrive(belt, rng, 12, lot=90.0)  # another lot
    watch(monday, belt, results)
    lines = images_of(results)
    assert len(lines) == 24
    alarms = [line["path"] for line in lines[12:] if line["decision"] != "normal"]
    assert len(alarms) >= 3

    training = line / "train/good/tr025.png"
    rows = [*((path, "false alarm") for path in alarms[:3]), (str(training), "missed")]
    pd.DataFrame(rows, columns=["image_path", "decision"]).to_csv(verdicts, index=False)
    second = tmp_path / "wednesday.ckpt"
    update(first, "--verdicts", verdicts, "--results", results, out=second)
    printed = capsys.readouterr().out
    assert "forgot 1" in printed
    assert "Replay of 24 decisions, 24 on images scored anew" in printed
    wednesday = export(second, tmp_path / "wednesday")
    assert main(["verify", str(wednesday), "--ckpt", str(second), "--data", str(belt), "--runs", "5", "--quiet"]) == 0

    arrive(belt, rng, 12, lot=90.0, defects=(5,))
    watch(wednesday, belt, results)
    third = tmp_path / "friday.ckpt"
    update(second, "--add", belt, out=third)
    watch(export(third, tmp_path / "friday"), belt, results)

    lines = images_of(results)
    assert len(lines) == len({line["path"] for line in lines}) == 36
    assert sum(line["decision"] != "normal" for line in lines[24:]) < len(alarms)
    assert lines[3]["decision"] == lines[29]["decision"] == "anomalous"
    known = load_checkpoint(third)
    kept = dict(zip(known.refinement.paths, known.refinement.kept, strict=True))
    assert not kept[lines[3]["path"]]
    assert not kept[lines[29]["path"]]
    assert all(kept[path] for path in alarms[:3])
    entries = read_sidecar(tmp_path / "friday/weights/onnx").training["history"]
    assert [len(entry["added"]) for entry in entries] == [3, 33]
    assert {added["decided_by"] for added in entries[0]["added"]} == {"user"}
    assert list(entries[0]["forgotten"]) == [str(training)]

    assert main(["explain", str(third), lines[3]["path"], "--html", str(tmp_path / "why.html")]) == 0
    assert main(["history", str(results)]) == 0
    page = (tmp_path / "line7.html").read_text()
    starts = [line["model"] for line in read_results(results) if line.get("event") == "start"]
    assert all(page.count(model[:12]) >= 1 for model in starts)
    assert len(set(starts)) == 3
    assert json.loads(results.read_text().splitlines()[-1]) is not None
