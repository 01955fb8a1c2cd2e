"""The stock `anomalib` command, in processes of its own, with nothing but our package installed."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from anomalib_metarefine.images.reading import file_hash
from anomalib_metarefine.model.checkpoints import KEY, read_checkpoint

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[1]
SMALL = ["--model.image_size", "[96,96]", "--model.meta_steps", "1", "--model.visualizer", "False"]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "TRUST_REMOTE_CODE": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def data(parts):
    config = {
        "class_path": "anomalib.data.Folder",
        "init_args": {
            "name": "parts",
            "root": str(parts),
            "normal_dir": "train/good",
            "abnormal_dir": "test/blob",
            "normal_test_dir": "test/good",
            "train_batch_size": 8,
            "eval_batch_size": 8,
            "num_workers": 0,
            "val_split_mode": "same_as_test",
        },
    }
    (parts / "data.yaml").write_text(yaml.safe_dump(config))
    return config


def test_train_test_predict_export(parts, data):
    model = ["--model", "MetaRefine", *SMALL]
    (parts / "decisions.csv").write_text(f"sha256,decision\n{file_hash(parts / 'train/good/003.png')},reject\n")
    (parts / "ignore.json").write_text("[[[0, 0], [0.35, 0], [0.35, 0.35], [0, 0.35]]]")
    ours = ["--model.decisions", str(parts), "--model.ignore", "ignore.json"]
    out = run("anomalib", "train", *model, *ours, "--data", "data.yaml", cwd=parts)
    assert "image_AUROC" in out
    (checkpoint,) = (parts / "results" / "MetaRefine" / "parts").glob("v*/weights/lightning/model.ckpt")
    kept = read_checkpoint(checkpoint)[KEY]
    assert kept["provenance"]["ignored"][0] == "##...."
    assert not dict(zip(kept["refinement"]["paths"], kept["refinement"]["kept"], strict=True))[
        str(parts / "train/good/003.png")
    ]
    restore = ["--ckpt_path", str(checkpoint)]
    assert "image_AUROC" in run("anomalib", "test", *model, "--data", "data.yaml", *restore, cwd=parts)
    run("anomalib", "predict", *model, "--data", str(parts / "test" / "blob"), *restore, cwd=parts)
    # with the defaults of the model: its settings are in the checkpoint
    run("anomalib", "export", "--model", "MetaRefine", "--export_type", "openvino", *restore, cwd=parts)
    assert len(list((parts / "results").rglob("model.xml"))) == 1


def test_benchmark_of_two_models_in_one_configuration(parts, data):
    config = yaml.safe_load((ROOT / "configs" / "benchmark.yaml").read_text())
    assert config["benchmark"]["model"]["class_path"]["grid"] == ["MetaRefine", "Patchcore"]
    # Its models and the names of its settings, on a backbone that is quick and parts that are few.
    small = {"backbone": "mobilenetv3_small_050", "layers": ["blocks.3"]}
    assert config["benchmark"]["model"]["init_args"].keys() == small.keys()
    config["benchmark"]["model"]["init_args"] = small | {"pre_trained": False}
    config["benchmark"]["data"] = data
    (parts / "benchmark.yaml").write_text(yaml.safe_dump(config))
    run("anomalib", "benchmark", "--config", "benchmark.yaml", cwd=parts)
    (results,) = (parts / "runs" / "benchmark").glob("*/results.csv")
    rows = pd.read_csv(results)
    assert rows["model.class_path"].tolist() == ["MetaRefine", "Patchcore"]
    assert rows.image_AUROC.between(0, 1).all()
