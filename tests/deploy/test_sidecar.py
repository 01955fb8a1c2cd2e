import json
import math

import pytest

from anomalib_metarefine.deploy.sidecar import (
    SCHEMA,
    SIDECAR,
    Sidecar,
    file_hash,
    read_sidecar,
    verify_files,
    write_sidecar,
)

SCALE = {"threshold": 10.0, "minimum": 2.0, "maximum": 22.0, "normalized_threshold": 0.5}


def sidecar(folder, **changes) -> Sidecar:
    (folder / "model.xml").write_text("graph")
    content = {
        "model": {"name": "MetaRefine", "format": "openvino", "precision": "FP32"},
        "files": {"model.xml": file_hash(folder / "model.xml")},
        "input": {"accepts": "any"},
        "image_score": SCALE,
        "anomaly_map": SCALE,
    }
    return Sidecar(**{**content, **changes})


def test_comes_back_as_written(tmp_path):
    written = sidecar(tmp_path, calibration={"bound": 0.01}, training={"seed": 3}, versions={"nncf": None})
    assert write_sidecar(tmp_path, written) == tmp_path / SIDECAR
    assert read_sidecar(tmp_path) == written
    verify_files(tmp_path, written)


def test_raw_scores_undo_the_normalisation(tmp_path):
    found = sidecar(tmp_path)
    assert [found.raw_score(score) for score in (0, 0.5, 0.75, 1)] == [0, 10, 15, 20]


def test_a_model_without_threshold_gives_valid_json(tmp_path):
    write_sidecar(tmp_path, sidecar(tmp_path, image_score={**SCALE, "threshold": math.nan}))
    assert read_sidecar(tmp_path).image_score["threshold"] is None


def test_names_the_file_that_changed_or_went_missing(tmp_path):
    written = sidecar(tmp_path)
    (tmp_path / "model.xml").write_text("another graph")
    with pytest.raises(ValueError, match=r"model.xml is not the file that was exported"):
        verify_files(tmp_path, written)
    (tmp_path / "model.xml").unlink()
    with pytest.raises(ValueError, match="no file"):
        verify_files(tmp_path, written)


def test_later_versions(tmp_path):
    path = write_sidecar(tmp_path, sidecar(tmp_path))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "more": 1}))
    assert read_sidecar(tmp_path).image_score == SCALE
    path.write_text(json.dumps({**content, "schema": SCHEMA + 1}))
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}"):
        read_sidecar(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}'])
def test_broken_metadata(tmp_path, content):
    (tmp_path / SIDECAR).write_text(content)
    with pytest.raises(ValueError, match=r"metadata.json .*Export the model again"):
        read_sidecar(tmp_path)


def test_no_metadata(tmp_path):
    with pytest.raises(FileNotFoundError, match="anomalib export"):
        read_sidecar(tmp_path)
