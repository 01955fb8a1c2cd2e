import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.run_folder import read_run
from anomalib_metarefine.images.hashes import data_sha256, file_sha256


def make_files(root: Path) -> Path:
    """A file for each of `DECISIONS`."""
    for name in DECISIONS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def make_manifest(root: Path, decisions: dict[str, str], **columns) -> Manifest:
    """A manifest of files that exist, with the decision given for each."""
    count = len(decisions)
    table = pd.DataFrame(
        {
            "image_path": list(decisions),
            "sha256": [file_sha256(root / path) for path in decisions],
            "decision": list(decisions.values()),
            "decided_by": "rule",
            "round": [int(decision == "reject") for decision in decisions.values()],
            "reason": "The tail of the patch scores, mostly.",
            "score": np.linspace(0, 5, count),
            "fence_distance": np.linspace(-3, 2, count),
            "q_value": np.linspace(1, 0, count),
            "variant": 0,
            "likeness": np.linspace(-1, 4, count),
            "score_tail": 1 / 3,
            "score_round_1": 0.1 + 0.2,
            "quality": "",
            **columns,
        }
    )
    return Manifest(table, {"root": str(root), "source": str(root), "seed": 0})


def visible(folder: Path) -> list[str]:
    """What a user sees of a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.fixture
def files(tmp_path):
    """Six small files in two folders."""
    root = tmp_path / "data"
    for i in range(6):
        path = root / ("left" if i < 3 else "right") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content {i}".encode())
    return root


DECISIONS = {
    "left/0.png": "keep",
    "left/1.png": "keep",
    "left/2.png": "review",
    "right/3.png": "reject",
    "right/4.png": "review",
    "right/5.png": "reject",
}


@pytest.fixture
def manifest(files):
    return make_manifest(files, DECISIONS)


def test_comes_back_from_its_files_to_the_last_bit(files, tmp_path):
    names = dict.fromkeys(DECISIONS, "keep")
    odd = ["NA", "007", 'com,ma "quoted".png', "schön ß.png", "line\nbreak.png", "re\rturn.png", " space.png", "'a.png"]
    odd += ["=1+1.png", "+a.png", "-a.png", "@a.png", "\ttab.png", "a;=1+1.png", "back\\x3dslash.png", "\uff1dwide.png"]
    for name in odd:
        (files / name).write_bytes(name.encode())
        names[name] = "reject"
    scores = np.random.default_rng(0).normal(size=len(names))
    scores[3] = np.nan
    manifest = make_manifest(files, names, score=scores, note="a column of the user's")
    written = manifest.write(tmp_path / "out")
    for path in (written, tmp_path / "out"):
        again = Manifest.read(path)
        pd.testing.assert_frame_equal(again.table, manifest.table, check_exact=True)
        counts = {"keep": 6, "reject": len(odd), "review": 0}
        assert again.run == {**manifest.run, "counts": counts, "files": again.run["files"]}
        assert again.verify() == ([], [])
    assert visible(tmp_path / "out") == ["manifest.csv", "run.json"]


def test_columns_are_put_in_order(manifest):
    table = manifest.table.assign(score_round_10=1.0, score_round_2=1.0)
    shuffled = table.sample(frac=1, random_state=0)[sorted(table.columns, reverse=True)]
    assert Manifest(shuffled, manifest.run).table.columns.tolist() == [
        *["image_path", "sha256", "decision", "decided_by", "round", "reason"],
        *["score", "fence_distance", "q_value", "variant", "likeness", "score_tail"],
        *["score_round_1", "score_round_2", "score_round_10", "quality"],
    ]
    assert Manifest(shuffled, manifest.run).table.image_path.tolist() == list(DECISIONS)


def test_a_failed_write_leaves_the_old_manifest(manifest, tmp_path, monkeypatch):
    manifest.write(tmp_path / "out")
    before = (tmp_path / "out" / "manifest.csv").read_bytes()
    manifest.table.loc[0, "decision"] = "reject"

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        manifest.write(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.csv").read_bytes() == before
    assert visible(tmp_path / "out") == ["manifest.csv", "run.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decision": "maybe"}, r"decision must be one of \['keep', 'reject', 'review'\]; found maybe"),
        ({"decided_by": "magic"}, "decided_by must be one of"),
        ({"image_path": "left/0.png"}, "5 images are listed more than once: left/0.png"),
        ({"image_path": [f"../{i}" for i in range(6)]}, "relative to the root, inside of it and .*; found ../0"),
        ({"image_path": [f"/tmp/{i}" for i in range(6)]}, "relative to the root, inside of it"),
        ({"image_path": [f"./{i}" for i in range(6)]}, "without `./`; found ./0"),
        ({"image_path": [f"a//{i}" for i in range(6)]}, "without `./`; found a//0"),
        ({"q_value": 1.5}, r"q_value must lie in \[0, 1\]; found 1.5"),
        ({"score": "high"}, "score must be a number"),
        ({"round": 0.5}, "round must be a whole number, found 0.5"),
        ({"round": np.nan}, "round must be a whole number"),
    ],
)
def test_says_what_is_wrong_with_a_table(manifest, change, message):
    with pytest.raises(ValueError, match=message):
        Manifest(manifest.table.assign(**change), manifest.run)


def test_says_what_is_wrong_with_the_files(manifest, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest.csv. Expected manifest.csv and run.json"):
        Manifest.read(tmp_path)
    manifest.write(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    for text, message in [
        ("{", "run.json is damaged: expected a JSON object"),
        ("[1, 2]", "run.json is damaged: expected a JSON object"),
        ('{"files": 3}', "run.json is damaged: expected a JSON object"),
        ("{}", "run.json is damaged: expected a JSON object"),
    ]:
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Manifest.read(tmp_path)
    for change, message in [
        ({"schema": "metarefine-manifest/9"}, "has schema 'metarefine-manifest/9'"),
        ({"schema": ["x"]}, r"has schema \['x'\]"),
        ({"root": 3}, "run\\['root'\\] must be of type str, found 3"),
        ({"root": "here"}, "must be the absolute folder of the images, found 'here'"),
        ({"structure": "aligned"}, "run\\['structure'\\] must be of type dict, found 'aligned'"),
        ({"answers": "many"}, "run\\['answers'\\] must be of type int, found 'many'"),
        ({"rounds": [{"number": 1, "fence": "high"}]}, "as entry 1"),
        ({"rounds": [7]}, "found 7 as entry 1"),
    ]:
        (tmp_path / "run.json").write_text(json.dumps({**run, **change}))
        with pytest.raises(ValueError, match=message):
            Manifest.read(tmp_path)


def test_a_manifest_that_was_cut_or_edited_is_refused(manifest, tmp_path):
    file = manifest.write(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    edited = [lines[0], lines[1].replace(b"keep", b"reject"), *lines[2:]]
    for wrong in (lines[:4], lines[:1], edited, [b""]):
        file.write_bytes(b"".join(wrong))
        with pytest.raises(ValueError, match="manifest.csv is not the file that run.json was written with: it is cut"):
            Manifest.read(tmp_path)
    file.write_bytes(b"".join(lines).replace(b"\n", b"\r\n"))  # as version control may check it out
    assert Manifest.read(tmp_path).counts == manifest.counts


def test_a_manifest_without_images(manifest):
    with pytest.raises(ValueError, match="it lists no image"):
        Manifest(manifest.table.head(0), manifest.run)


def test_hashes_are_compared_in_any_case(manifest):
    assert Manifest(manifest.table.assign(sha256=manifest.table.sha256.str.upper()), manifest.run).verify() == ([], [])


def test_names_are_no_formulas_in_a_spreadsheet(files, tmp_path):
    names = ["=cmd|' /C calc'!A0.png", "+1.png", "-1.png", "@sum.png", "\r=1.png", "a;=1.png", "plain.png"]
    make_manifest(files, dict.fromkeys(names, "keep"), sha256="").write(tmp_path)
    text = (tmp_path / "manifest.csv").read_text()
    assert len(text.splitlines()) == 1 + len(names)  # one row a line
    for separator in ",;":
        cells = [cell for row in csv.reader(text.splitlines(), delimiter=separator) for cell in row]
        assert [cell for cell in cells if cell.lstrip()[:1] in "=+-@" and not _is_number(cell)] == []
    assert "\nplain.png," in text


def _is_number(cell):
    try:
        float(cell)
    except ValueError:
        return not cell
    return True


def test_orders_by_what_a_person_looks_at_first(files):
    manifest = make_manifest(
        files,
        dict(zip(DECISIONS, ["reject", "reject", "reject", "review", "review", "review"], strict=True)),
        score=[1.0, np.nan, 2.0, 0.2, 0.6, 0.4],
        q_value=[0.5, np.nan, 0.9, 0.1, 0.9, 0.5],  # it does not follow the score where a folder has variants
    )
    assert [path.name for path in manifest.rejected] == ["2.png", "0.png", "1.png"]
    assert [path.name for path in manifest.paths(manifest.rows("review"))] == ["4.png", "5.png", "3.png"]
    assert manifest.kept == []
    assert manifest.rejected[0] == files / "left" / "2.png"


def test_verdict_says_what_came_out_what_folder_it_is_and_what_to_do(manifest):
    assert manifest.headline == "2 of 6 images (33.3 %) were rejected, and 2 more are doubtful."
    assert manifest.verdict == (
        f"{manifest.headline} Look at the 6 highest scores first: about 1 minute. "
        "How many dirty images there are can't be said before somebody has looked."
    )
    manifest.run["structure"] = {"text": "Photographs of one kind of part."}
    assert f"{manifest.headline} Photographs of one kind of part. Look at" in manifest.verdict
    assert manifest.verdict in repr(manifest)
    manifest.table.loc[:3, "decided_by"] = "user"  # keep, keep, review, reject
    assert manifest.verdict.endswith("one kind of part. A person has looked at 4, and found 1 dirty.")


def test_headline_of_one_image(files):
    decisions = dict.fromkeys(DECISIONS, "keep") | {"left/0.png": "reject", "left/1.png": "review"}
    manifest = make_manifest(files, decisions)
    assert manifest.headline == "1 of 6 images (16.7 %) was rejected, and 1 more is doubtful."
    nothing = make_manifest(files, dict.fromkeys(DECISIONS, "keep"))
    assert nothing.headline == "0 of 6 images (0 %) were rejected."  # and "look at the highest scores first" follows


@pytest.mark.parametrize(("rejected", "first", "minutes"), [(0, 40, "1 minute."), (100, 100, "3 minutes.")])
def test_the_first_look_covers_what_the_rule_doubts(rejected, first, minutes):
    names = {f"{i:03d}.png": "reject" if i < rejected else "keep" for i in range(200)}
    verdict = make_manifest(Path("/nowhere"), names).verdict
    assert f"Look at the {first} highest scores first: about {minutes}" in verdict


def test_verify_reads_the_bytes(manifest, files):
    stat = (files / "left/0.png").stat()
    (files / "left/0.png").write_bytes(b"CONTENT 0")  # same size, same time
    os.utime(files / "left/0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (files / "right/5.png").unlink()
    assert manifest.verify() == (["right/5.png"], ["left/0.png"])
    assert manifest.verify(["review"]) == ([], [])
    with pytest.raises(ValueError, match=r"1 missing \(right/5.png\), 1 changed \(left/0.png\)"):
        manifest.require_unchanged()


def test_images_that_moved_with_their_root_are_found(manifest, files, tmp_path):
    manifest.write(tmp_path / "out")
    shutil.move(files, tmp_path / "elsewhere")
    assert len(Manifest.read(tmp_path / "out").verify().missing) == 6
    assert Manifest.read(tmp_path / "out", root=tmp_path / "elsewhere").verify() == ([], [])


def test_hash_of_the_data_set_ignores_order_only():
    first = data_sha256(["a", "b"], ["1", "2"])
    assert first == data_sha256(["b", "a"], ["2", "1"])
    assert first != data_sha256(["a", "b"], ["2", "1"])


def test_run_json_is_for_people_and_other_programs(manifest, tmp_path):
    manifest.run["seconds"] = {"backbone": 1.5}
    manifest.write(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["schema"], run["seconds"], run["counts"]["review"]) == (
        "metarefine-manifest/1",
        {"backbone": 1.5},
        2,
    )


def test_as_parquet_it_is_the_same_and_stays_parquet(manifest, tmp_path):
    pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    manifest.write(out)
    assert manifest.write(out, parquet=True) == out / "manifest.parquet"
    found = Manifest.read(out)
    pd.testing.assert_frame_equal(found.table, manifest.table)
    found.write(out)  # as a review does
    assert set(read_run(out / "manifest.parquet")["files"]) == {"manifest.parquet"}
    with pytest.raises(ValueError, match="is not the file that"):  # that of the earlier run is still there
        Manifest.read(out / "manifest.csv")
    manifest.write(out)
    assert "manifest.csv" in Manifest.read(out).run["files"]


def test_chunks_make_one_file(manifest, tmp_path, monkeypatch):
    manifest.write(tmp_path / "whole")
    monkeypatch.setattr("anomalib_metarefine.curation.manifest._CHUNK", 2)
    manifest.write(tmp_path / "parts")
    whole, parts = ((tmp_path / name / "manifest.csv").read_bytes() for name in ("whole", "parts"))
    assert parts == whole
    assert manifest.verify() == ([], [])
