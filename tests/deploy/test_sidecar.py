import json
import math

import pytest

from anomalib_metarefine.deploy.detector import Detector
from anomalib_metarefine.deploy.monitor import Monitor
from anomalib_metarefine.deploy.sidecar import (
    SCHEMA,
    SIDECAR,
    Sidecar,
    read_sidecar,
    verify_files,
    write_sidecar,
)
from anomalib_metarefine.images.reading import file_hash
from tests.deploy.conftest import pixels

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


WRONG = [3, "text", [1, "a"], {"a": {}}, True, [[1]], math.nan, -1, 2.5]
PLACES = ["schema", "model", "model.format", "files", "files.model.xml", "input", "input.accepts", "input.size"]
PLACES += ["input.antialias", "input.bit_depth", "image_score", "image_score.threshold", "anomaly_map"]
PLACES += ["calibration", "calibration.quantiles", "calibration.images", "calibration.set_aside"]
PLACES += ["calibration.uncertain", "calibration.uncertain.lower", "training", "versions"]


def block_of(content, place):
    """The block that a place lies in, and its name there."""
    *blocks, name = place.split(".", 1 if place.startswith("files.") else -1)
    for block in blocks:
        content = content[block]
    return content, name


@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_wrong_in_it_is_told_in_a_sentence(brightness, place):
    """The line starts, as the value is fine after all, or says what is wrong; no other error, now or at an image."""
    path = brightness / SIDECAR
    whole = path.read_text()
    told = 0
    for value in WRONG:
        content = json.loads(whole)
        block, name = block_of(content, place)
        block[name] = value
        path.write_text(json.dumps(content))
        try:
            detector = Detector(brightness, verify=place.startswith("files"))
            monitor = Monitor(detector, {})
            monitor.update(detector.predict(pixels(100)).raw_score)
        except ValueError as error:
            assert str(error).endswith(".")  # noqa: PT017
            told += 1
    assert told >= 4, place


@pytest.mark.parametrize("place", ["files", "input", "image_score", "calibration.images", "model"])
def test_what_is_missing_is_told_in_a_sentence(brightness, place):
    path = brightness / SIDECAR
    content = json.loads(path.read_text())
    block, name = block_of(content, place)
    del block[name]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"metadata\.json lacks .*{name}.*Export the model again\."):
        Monitor(Detector(brightness), {})
