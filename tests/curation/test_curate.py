"""Curation from end to end, on a small folder of parts with visible defects."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_metarefine.cli import main
from anomalib_metarefine.curation.curate import _rejected_since, curate
from anomalib_metarefine.curation.evidence import Evidence, _group
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.refinement.rounds import Refinement, Round
from tests.conftest import folder, part, plate
from tests.curation.test_manifest import visible

SMALL = {"image_size": (96, 96), "dimensions": 32, "meta_steps": 2, "progress": False}


@pytest.fixture
def dirty(tmp_path):
    """36 good parts in two shifts, 4 defective ones among them, in a folder of their own."""
    rng = np.random.default_rng(0)
    root = tmp_path / "line7"
    for i in range(40):
        place = root / f"shift{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        part(rng, defect=i % 10 == 9).save(place / f"{'bad' if i % 10 == 9 else 'good'}{i:02d}.png")
    return root


def bad(manifest) -> set[str]:
    return {path for path in manifest.table.image_path if "bad" in path}


def test_finds_the_dirty_images_and_says_why(dirty):
    before = {p: p.stat().st_mtime_ns for p in dirty.rglob("*")}
    manifest, evidence = curate(dirty, **SMALL)
    table = manifest.table
    rejected = table[table.decision == "reject"]
    assert set(rejected.image_path[rejected.score.nlargest(4).index]) == bad(manifest)
    assert len(rejected) <= 5  # of so few, one good one is about what the rule allows itself
    assert (rejected.fence_distance > 0).all()
    assert (rejected["round"] >= 1).all()
    assert (rejected.q_value <= 0.1).all()
    assert (rejected.likeness > 3).all()
    assert rejected.reason.str.contains("Unusual, and in the way in which other images are; score ").all()
    assert (table.score[table.decision == "keep"] < rejected.score.min()).all()
    assert table.reason[table.decision == "keep"].str.startswith("Kept; score ").all()  # the highest is not "usual"
    assert {"score_likelihood", "score_neighbours", "score_round_1"} <= set(table)
    assert set(table.variant) == {0}
    assert manifest.root == dirty
    assert manifest.run["structure"]["kind"] == "aligned"
    assert (manifest.run["answers"], manifest.run["data"]["images"]) == (0, 40)
    # The evidence: what is not simply kept comes first, worst on top, with a good image beside each.
    doubtful = table[table.decision != "keep"].sort_values("score", ascending=False)
    assert evidence.paths[: len(doubtful)] == doubtful.image_path.tolist()
    assert all("good" in near for near in evidence.nearest)
    assert evidence.maps.shape[1:] == (6, 6)
    assert {p: p.stat().st_mtime_ns for p in dirty.rglob("*")} == before  # nothing of the user's was touched


def test_same_seed_same_manifest(dirty):
    first, second = curate(dirty, **SMALL), curate(sorted(dirty.rglob("*.png"), reverse=True), **SMALL)
    pd.testing.assert_frame_equal(first.manifest.table, second.manifest.table)
    np.testing.assert_array_equal(first.evidence.maps, second.evidence.maps)


def test_a_run_can_be_made_again(dirty, tmp_path):
    settings = SMALL | {"layers": ["blocks.2"], "dimensions": 24, "neighbour_weight": 0.5, "shrinkage": 0.4}
    first = curate(dirty, seed=5, rule="share:0.1", quality=False, bit_depth=8, **settings).manifest
    first.write(tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    again = curate(run["source"], root=run["root"], seed=run["seed"], progress=False, **run["settings"]).manifest
    pd.testing.assert_frame_equal(again.table, first.table, check_exact=True)
    told = {name: value for name, value in again.run.items() if name not in ("created", "seconds")}
    assert told == {name: first.run[name] for name in told}
    other = curate(run["source"], seed=6, progress=False, **run["settings"]).manifest
    assert not other.table.score.equals(first.table.score)


def test_decisions_of_a_person_hold_and_are_remembered(dirty, tmp_path):
    out = tmp_path / "out"
    first = curate(dirty, **SMALL)
    first.write(out)
    wrong, missed = sorted(bad(first.manifest))[0], first.manifest.table.image_path[0]
    table = pd.DataFrame({"image_path": [wrong, missed], "decision": ["keep", "reject"]})
    table.to_csv(tmp_path / "d.csv", index=False)
    manifest = curate(dirty, decisions=tmp_path / "d.csv", **SMALL).manifest
    assert (first.manifest.run["answers"], manifest.run["answers"]) == (0, 2)
    second = manifest.table.set_index("image_path")
    assert second.decision[[wrong, missed]].tolist() == ["keep", "reject"]
    assert second.decided_by[[wrong, missed]].tolist() == ["user", "user"]
    assert second.reason[wrong].startswith("A person said keep; score ")
    # Remembered by content: the file has another name in the next run.
    assert main(["review", str(out), "--decisions", str(tmp_path / "d.csv")]) == 0
    (dirty / wrong).rename(dirty / "renamed.png")
    third = curate(dirty, decisions=[out, {}], **SMALL).manifest.table.set_index("image_path")
    assert (third.decision["renamed.png"], third.decided_by["renamed.png"]) == ("keep", "user")
    assert third.decided_by[missed] == "user"


def test_decisions_on_other_images_are_an_error(dirty, tmp_path):
    (tmp_path / "d.csv").write_text("image_path,decision\nno.png,keep\n")
    with pytest.raises(ValueError, match=r"not here: no\.png"):
        curate(dirty, decisions=tmp_path / "d.csv", **SMALL)


def test_unreadable_and_odd_images(dirty):
    (dirty / "empty.png").write_bytes(b"")
    (dirty / "text.jpg").write_text("no image")
    shutil.copy(dirty / "shift0/good00.png", dirty / "copy.png")
    Image.new("L", (96, 96)).save(dirty / "black.png")
    table = curate(dirty, **SMALL).manifest.table.set_index("image_path")
    assert table.decided_by[["empty.png", "text.jpg"]].tolist() == ["unreadable", "unreadable"]
    assert np.isnan(table.score["empty.png"])
    assert "the file is empty" in table.reason["empty.png"]
    assert table.quality["shift0/good00.png"] == "exact duplicate of copy.png"
    assert "blank" in table.quality["black.png"]
    without = curate(dirty, quality=False, **SMALL).manifest.table
    assert (without.quality == "").all()


def test_ten_images_and_one(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(10):
        part(rng).save(tmp_path / f"{i}.png")
    curation = curate(tmp_path, **SMALL)
    assert curation.manifest.counts["reject"] == 0
    report = curation.write(tmp_path / "out")
    assert "10 images" in report.read_text(encoding="utf-8")
    alone = curate([tmp_path / "0.png"], root=tmp_path, **SMALL)
    assert alone.manifest.counts == {"keep": 1, "reject": 0, "review": 0}


def test_a_users_own_grouping_is_taken_from_folders_or_a_column(dirty, tmp_path):
    by_folder = curate(dirty, variants="folders", **SMALL).manifest
    assert set(by_folder.table.variant + by_folder.table.image_path.str.contains("shift1")) == {0, 2}
    assert "2 variants, as given: shift0 (20 images), shift1 (20 images)" in by_folder.run["structure"]["text"]
    names = by_folder.table.image_path
    table = tmp_path / "list.csv"
    pd.DataFrame({"image_path": names, "variant": np.where(names.str.contains("bad"), "b", "g")}).to_csv(table)
    by_column = curate(table, root=dirty, variants="column", rounds=0, **SMALL).manifest.table
    assert by_column.variant.tolist() == by_column.image_path.str.contains("bad").astype(int).tolist()
    with pytest.raises(ValueError, match="needs a table of images with a column"):
        curate(dirty, variants="column", **SMALL)


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"None of the 1 images can be read.*a\.png"):
        curate(tmp_path, **SMALL)


def test_takes_the_shape_of_the_images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        part(rng, size=(200, 80)).save(tmp_path / f"{i}.png")
    manifest = curate(tmp_path, **{**SMALL, "image_size": None}).manifest
    assert manifest.run["settings"]["image_size"] == [416, 160]


def test_a_share_is_rejected_exactly_and_rounds_can_be_off(dirty, tmp_path):
    assert curate(dirty, rule="share:0.1", **SMALL).manifest.counts["reject"] == 4
    off = curate(dirty, rounds=0, **SMALL)
    off.write(tmp_path / "off")  # images were not compared, and JSON has no NaN to say so
    assert (off.manifest.counts["reject"], off.manifest.run["stop_reason"]) == (0, "off")


def test_datamodules_and_bounded_memory(parts):
    held = curate(folder(parts), **SMALL).manifest
    spilled = curate(folder(parts), memory_limit_mb=0, **SMALL).manifest
    assert len(held.table) == 24
    pd.testing.assert_frame_equal(spilled.table, held.table)


def test_command_writes_everything(dirty, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["curate", str(dirty), "--out", str(out), "--image-size", "96", "96"]
    arguments += ["--rule", "share:0.1", "--settings", "dimensions=32", "meta_steps=2"]
    assert main([*arguments, "--fail-above", "0.05"]) == 1
    assert main(arguments) == 0
    assert "4 of 40 images (10 %) were rejected" in capsys.readouterr().out
    assert visible(out) == ["evidence.npz", "manifest.csv", "report.html", "run.json"]
    assert json.loads((out / "run.json").read_text())["counts"]["reject"] == 4
    assert Evidence.load(out / "evidence.npz").paths
    assert main(["report", str(out)]) == 0
    assert Manifest.read(out).counts["reject"] == 4
    assert main(["curate", str(tmp_path / "nowhere"), "--out", str(out)]) == 2


def test_look_alikes_are_one_group_and_the_largest_comes_first():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, 16))
    which = np.array([0] * 2 + [1] * 5 + [2] * 3)
    groups = np.array(_group(kinds[which] * rng.uniform(1, 5, (10, 1)) + 0.01 * rng.normal(size=(10, 16))))
    assert [len(set(groups[which == kind])) for kind in range(3)] == [1, 1, 1]
    assert set(groups[which == 1]) == {0}
    assert _group(np.ones((3, 4))) == [-1, -1, -1]
    assert _group(np.ones((8, 4))) == [0] * 8


def test_an_image_is_rejected_since_it_last_crossed_the_fence():
    rounds = [Round(1.0, scores, 0) for scores in ([2.0, 0.0, 2.0, 2.0], [2.0, 2.0, 0.0, 0.0], [2.0, 2.0, 2.0, 0.0])]
    refinement = Refinement(["a", "b", "c", "d"], [False, False, False, True], [0.0] * 4, rounds)
    assert _rejected_since(refinement).tolist() == [1, 2, 3, 0]


@pytest.mark.usefixtures("patches_of_few_images")
def test_repair_of_images_that_no_rule_rejects(spotted, tmp_path):
    plates, out, to = spotted / "train/good", tmp_path / "out", tmp_path / "to"
    curation = curate(plates, rule="share:0", tail=0.2, **SMALL)
    with_spot = {f"{i:02d}.png" for i in (3, 11, 19)}
    assert curation.manifest.counts["reject"] == 0
    assert with_spot <= set(curation.evidence.unusual_in)
    curation.write(out)
    read = Evidence.load(out / "evidence.npz")
    assert read.unusual_in == curation.evidence.unusual_in
    np.testing.assert_array_equal(read.unusual, curation.evidence.unusual)
    assert main(["apply", str(out), "--to", str(to), "--mode", "repair", "--review", "keep"]) == 0
    repaired = set(pd.read_csv(to / "repairs.csv").image_path)
    assert {"03.png"} <= repaired <= set(read.unusual_in)  # of six by six patches, a region is soon half the image
    usual = np.asarray(plate(2))
    for path in plates.iterdir():
        after = to / "keep" / path.name
        if path.name not in repaired:
            assert after.read_bytes() == path.read_bytes()
            continue
        levels = [np.asarray(Image.open(image))[36:48, 36:48].mean() for image in (path, after)]
        assert levels[1] == pytest.approx(usual[36:48, 36:48].mean(), abs=12)
        assert (levels[0] > levels[1] + 60) == (path.name in with_spot)


def test_q_values_are_those_of_the_rule_that_decided(dirty):
    """With another tail they were those of the default, so that review went by other odds than the rule."""
    found = curate(dirty, rule="auto:level=0.1,tail=0.2", quality=False, **SMALL).manifest.table
    assert (found.decision == "reject").sum() > 4
    assert (found.q_value[found.decision == "reject"] <= 0.1).all()


def test_ignored_regions_are_in_no_score_and_no_map(dirty, tmp_path):
    """All defects lie in the middle of a part, and that is ignored here. Features see a little of it from around."""
    regions = tmp_path / "regions.json"
    regions.write_text(json.dumps([[[0.16, 0.16], [0.84, 0.16], [0.84, 0.84], [0.16, 0.84]]]))
    manifest, evidence = curate(dirty, ignore=regions, **SMALL)
    assert manifest.run["ignored"] == ["......", ".####.", ".####.", ".####.", ".####.", "......"]
    assert manifest.run["settings"]["ignore"] == str(regions)
    everything, _ = curate(dirty, **SMALL)
    assert everything.run["ignored"] is None
    ignoring, looking = (
        found.table.set_index("image_path").score[sorted(bad(found))] for found in (manifest, everything)
    )
    assert ignoring.max() < looking.min() / 5
    assert evidence.maps.shape[1:] == (6, 6)
    np.testing.assert_array_equal(evidence.maps[:, 1:5, 1:5], evidence.maps.min())
    assert not evidence.unusual[:, 1:5, 1:5].any()
