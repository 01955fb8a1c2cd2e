"""From the line back into the model."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from anomalib_metarefine.cli import main
from anomalib_metarefine.images.reading import file_hash
from anomalib_metarefine.model.calibration import raw_scores
from anomalib_metarefine.model.checkpoints import load_checkpoint
from anomalib_metarefine.model.replay import Verdicts, read_verdicts, replay
from anomalib_metarefine.model.update import threshold_of


def lines_of(model, paths):
    """As `metarefine watch` writes them."""
    threshold = threshold_of(model)
    scores = raw_scores(model, paths).image.tolist() if paths else []
    return [
        {
            "path": str(path), "sha256": file_hash(path), "raw_score": score, "threshold": threshold,
            "decision": "anomalous" if score > threshold else "normal",
        }
        for path, score in zip(paths, scores, strict=True)
    ]  # fmt: skip


def test_verdicts_are_sorted_by_what_they_ask_for(line, checkpoint):
    model = load_checkpoint(checkpoint)
    known, dirty, new, missed = (
        line / name for name in ("train/good/tr001.png", "train/good/tr025.png", "later/la001.png", "later/la007.png")
    )
    results = [{"path": str(new), "sha256": file_hash(new)}, {"event": "start"}]
    asked = [
        (str(known), "", False), ("", file_hash(dirty), True), ("", file_hash(new), True), (str(missed), "", False),
        ("gone.png", "", True),
    ]  # fmt: skip
    assert read_verdicts(model, asked, results) == Verdicts(
        [str(new)], [str(known)], {str(dirty): True, str(new): True}, [str(missed)], ["gone.png"]
    )


def test_a_replay_scores_what_is_there_anew_and_takes_old_scores_for_the_rest(line, checkpoint, tmp_path):
    model = load_checkpoint(checkpoint)
    there = [Path(shutil.copy(path, tmp_path)) for path in sorted((line / "test/blob").iterdir())]
    lines = [{"event": "start"}, *lines_of(model, there)]
    assert replay(model, lines).now_normal == []
    model.update(add=there, answers={str(path): True for path in there})
    now = raw_scores(model, there).image > threshold_of(model)
    found = replay(model, lines)
    assert (found.images, found.rescored) == (4, 4)
    assert found.now_normal == [str(path) for path, still in zip(there, now, strict=True) if not still]
    there[0].unlink()
    there[1].write_bytes(there[2].read_bytes())
    assert replay(model, lines).rescored == 2
    model.post_processor._image_threshold.fill_(99.0)
    assert len(replay(model, lines).now_normal) == 4
    model.post_processor._image_threshold.fill_(-99.0)
    normal = lines_of(model, there[1:2])
    normal[0]["threshold"] = 1e9
    assert replay(model, normal).now_anomalous == [str(there[1])]


def test_one_command_from_results_and_verdicts_to_a_model(line, checkpoint, tmp_path, capsys):
    model = load_checkpoint(checkpoint)
    images = sorted((line / "later").iterdir())
    results, verdicts = tmp_path / "line.jsonl", tmp_path / "verdicts.csv"
    records = [{"event": "start", "model": "a"}, *lines_of(model, images)]
    results.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [(str(images[7]), "false alarm"), (str(line / "train/good/tr025.png"), "missed")]
    pd.DataFrame(rows, columns=["image_path", "decision"]).to_csv(verdicts, index=False)
    out = tmp_path / "new.ckpt"
    options = ["--verdicts", str(verdicts), "--results", str(results), "--out", str(out)]
    assert main(["update", str(checkpoint), *options, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "Added 1 images, rejected 0 new ones, forgot 1" in printed
    assert "Replay of 8 decisions, 8 on images scored anew" in printed
    (entry,) = load_checkpoint(out).provenance["history"]
    assert [added["decided_by"] for added in entry["added"]] == ["user"]
    assert list(entry["forgotten"]) == [str(line / "train/good/tr025.png")]
    assert main(["update", str(checkpoint), *options]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_command_that_asks_for_nothing_is_refused(checkpoint, tmp_path, capsys):
    assert main(["update", str(checkpoint), "--out", str(tmp_path / "new.ckpt")]) == 2
    assert "Pass --add, --forget, --verdicts or --reconsider" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["folder", "table"])
def test_images_to_add_are_a_folder_or_a_table(line, checkpoint, tmp_path, data, capsys):
    source = line / "later"
    if data == "table":
        source = tmp_path / "images.csv"
        pd.DataFrame({"image_path": [str(path) for path in sorted((line / "later").iterdir())]}).to_csv(source)
    assert main(["update", str(checkpoint), "--add", str(source), "--out", str(tmp_path / "new.ckpt")]) == 0
    assert "Added 7 images, rejected 1 new ones, forgot 0" in capsys.readouterr().out
