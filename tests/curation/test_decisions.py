from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from anomalib_metarefine.curation.decisions import append, decide, remember
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.questions import template
from anomalib_metarefine.images.answers import Answer, load, read
from tests.curation.test_manifest import make_manifest

NAMES = [f"{i}.png" for i in range(6)]
VERDICTS = ["keep", "keep", "review", "review", "reject", "reject"]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "data" / name).write_bytes(bytes([i]))
    return tmp_path / "data"


@pytest.fixture
def manifest(root):
    return make_manifest(root, dict(zip(NAMES, VERDICTS, strict=True)))


def answers(**decisions) -> pd.DataFrame:
    """``_1="keep"``: image 1.png is to be kept."""
    paths = [f"{name.lstrip('_')}.png" for name in decisions]
    return pd.DataFrame({"sha256": "", "image_path": paths, "decision": list(decisions.values())})


class TestReadDecisions:
    def test_in_peoples_words(self, tmp_path):
        keep = ["keep", " Good", "OK", "clean", "normal", "i.O.", "i. O.", "IO", "pass", "0"]
        reject = [
            "reject",
            "BAD ",
            "ng",
            "dirty",
            "Defective",
            "anomalous",
            "nok",
            "NOK",
            "n.i.O.",
            "n. i. O.",
            "fail",
            "1",
        ]
        rows = [f"{i}.png,{word}" for i, word in enumerate([*keep, *reject, "", " ", "review"])]
        (tmp_path / "d.csv").write_text("image_path,decision\n" + "\n".join(rows) + "\n")
        table = read(tmp_path / "d.csv")
        assert table.decision.tolist() == ["keep"] * len(keep) + ["reject"] * len(reject)
        assert table.columns.tolist() == ["sha256", "image_path", "decision"]
        assert table.image_path.iloc[-1] == f"{len(keep + reject) - 1}.png"

    def test_by_hash_alone(self, tmp_path):
        (tmp_path / "d.csv").write_text("decision;sha256\r\nkeep;ABC\r\n")
        assert read(tmp_path / "d.csv").to_numpy().tolist() == [["abc", "", "keep"]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "image_path,decision\na,perhaps\nb,keep\n",
                "not understood: 'perhaps' in row 1. Write one of keep",
            ),
            ("path,decision\na,keep\n", "needs a column decision, and image_path or sha256; found path, decision"),
            ("image_path\na\n", "needs a column decision"),
            ("image_path,sha256,decision\n,,keep\n", "1 decisions with neither image_path nor sha256"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, text, message):
        (tmp_path / "d.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "d.csv")

    def test_refuses_a_manifest(self, manifest, tmp_path):
        with pytest.raises(ValueError, match="is a manifest. Pass a file with only"):
            read(manifest.write(tmp_path))
        with pytest.raises(FileNotFoundError, match="no decisions at"):
            read(tmp_path / "none.csv")


class TestDecide:
    def test_overrides_the_rule(self, manifest):
        decided = decide(manifest, answers(_0="reject", _2="keep", _4="keep", _5="reject"))
        assert decided.table.decision.tolist() == ["reject", "keep", "keep", "review", "keep", "reject"]
        assert decided.table.decided_by.tolist() == ["user", "rule", "user", "rule", "user", "user"]
        assert decided.table["round"].tolist() == [0, 0, 0, 0, 0, 1]
        assert decided.table.reason[4] == "A person said keep; the rule said reject."
        assert manifest.table.decision.tolist() == VERDICTS

    def test_is_found_by_content_then_by_path(self, manifest):
        sha256 = manifest.table.sha256
        decisions = pd.DataFrame(
            {
                "sha256": [sha256[0], "no longer there"],
                "image_path": ["5.png", "1.png"],  # content goes first, though the path is another image's
                "decision": "reject",
            }
        )
        assert decide(manifest, decisions).table.decision.tolist() == ["reject", "reject", *VERDICTS[2:]]

    def test_a_second_opinion(self, manifest):
        once = decide(manifest, answers(_0="reject"))
        pd.testing.assert_frame_equal(decide(once, answers(_0="reject")).table, once.table)
        assert decide(once, answers(_0="keep")).table.reason[0] == "A person said keep; a person said reject."

    def test_holds_for_every_copy(self, root):
        for name in ("1.png", "4.png"):
            (root / name).write_bytes((root / "0.png").read_bytes())
        manifest = make_manifest(root, dict(zip(NAMES, VERDICTS, strict=True)))
        assert decide(manifest, answers(_1="reject")).table.decision.tolist()[:2] == ["reject", "reject"]
        with pytest.raises(ValueError, match=r"1 decisions contradict .* exact copy of it: 0.png"):
            decide(manifest, answers(_1="reject", _4="keep"))

    def test_refuses(self, manifest):
        unknown = answers(_0="keep", **{f"_{i}": "keep" for i in range(6, 14)})
        with pytest.raises(ValueError, match="8 decisions are about images that are not in the .*: 6.png, .* 3 more"):
            decide(manifest, unknown)
        with pytest.raises(ValueError, match="1 decisions contradict an earlier one"):
            decide(manifest, pd.concat([answers(_0="keep"), answers(_0="reject")]))
        broken = Manifest(manifest.table.assign(decided_by="unreadable", sha256="", decision="reject"), manifest.run)
        with pytest.raises(ValueError, match="1 images to keep can't be read: 3.png"):
            decide(broken, answers(_3="keep"))
        assert decide(broken, answers(_3="reject")).table.decided_by[3] == "user"

    def test_the_verdict_tells_of_the_answers(self, manifest):
        decided = decide(manifest, answers(_0="reject", _2="keep", _5="reject"))
        assert "A person has looked at 3, and found 2 dirty." in decided.verdict
        assert "can't be said before somebody has looked" in manifest.verdict


class TestHistory:
    HEADER = "image_path,sha256,decision,when,by\n"

    def test_answers_are_added_and_the_last_one_counts(self, tmp_path):
        assert load(tmp_path / "out") == {}
        path = append(tmp_path / "out", [Answer("a.png", "aa", "reject", by="Ada"), Answer("=b.png", "bb", "keep")])
        first = path.read_bytes()
        append(tmp_path / "out", [Answer("a.png", "aa", "keep", by="Ada")])
        assert path.read_bytes().startswith(first)  # history stays
        assert load(tmp_path / "out") == {"aa": "keep", "bb": "keep"}
        lines = path.read_text().splitlines()
        assert lines[0] + "\n" == self.HEADER
        assert lines[2].startswith("'=b.png,bb,keep,")
        assert read(path).image_path.tolist() == ["=b.png", "a.png"]
        assert pd.to_datetime(pd.read_csv(path).when).dt.tz is not None

    def test_an_answer_can_be_taken_back(self, tmp_path):
        append(tmp_path, [Answer("a.png", "aa", "reject"), Answer("b.png", "bb", "keep")])
        append(tmp_path, [Answer("a.png", "aa", "review")])
        assert load(tmp_path) == {"bb": "keep"}

    def test_people_who_disagree_are_named(self, tmp_path, caplog):
        append(tmp_path, [Answer("a.png", "aa", "reject", by="Ada"), Answer("b.png", "bb", "reject", by="Ada")])
        append(tmp_path, [Answer("a.png", "AA", "keep", by="Bob"), Answer("b.png", "bb", "keep", by="Ada")])
        assert load(tmp_path) == {"aa": "keep", "bb": "keep"}
        assert "people disagree about images (a.png); the last answer counts" in caplog.text

    def test_a_contradiction_without_a_date_is_an_error(self, tmp_path):
        (tmp_path / "d.csv").write_text("image_path,decision\na.png,keep\nb.png,keep\na.png,nok\n")
        with pytest.raises(ValueError, match="d.csv contradicts itself about 1 images: a.png. Leave one answer"):
            read(tmp_path / "d.csv")

    def test_a_last_line_that_was_cut_off(self, tmp_path, caplog):
        path = append(tmp_path, [Answer("a.png", "aa", "keep"), Answer("b.png", "bb", "reject")])
        path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"reject") + 3])
        append(tmp_path, [Answer("c.png", "cc", "reject")])
        assert load(tmp_path) == {"aa": "keep", "cc": "reject"}
        assert "1 lines were cut off while being written" in caplog.text
        path.write_text(self.HEADER + "a.png,aa,keep,now,Ada")  # a spreadsheet left the end of the line out
        append(tmp_path, [Answer("b.png", "bb", "reject")])
        assert load(tmp_path) == {"aa": "keep", "bb": "reject"}

    def test_a_full_disk_leaves_the_file_as_it_was(self, tmp_path, monkeypatch):
        path = append(tmp_path, [Answer("a.png", "aa", "keep")])
        before = path.read_bytes()

        def fail(descriptor):
            raise OSError("disk full")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            append(tmp_path, [Answer("b.png", "bb", "keep")])
        assert path.read_bytes() == before

    def test_a_file_of_another_kind_is_not_added_to(self, tmp_path):
        path = tmp_path / "decisions.csv"
        path.write_text("sha256,image_path,decision\naa,a.png,keep\n")
        assert load(tmp_path) == {"aa": "keep"}  # but it is understood
        with pytest.raises(ValueError, match="has other columns than image_path, sha256, decision, when, by"):
            append(tmp_path, [Answer("b.png", "bb", "keep")])
        path.write_text("image_path,decision\na.png,keep\n")
        with pytest.raises(ValueError, match="1 answers without sha256: a.png"):
            load(tmp_path)
        path.write_text("sha256\naa\n")
        with pytest.raises(ValueError, match="needs a column decision"):
            load(tmp_path)

    def test_no_answer_no_file(self, tmp_path):
        append(tmp_path / "out", [])
        assert not (tmp_path / "out").exists()
        for wrong in (Answer("a.png", "aa", "maybe"), Answer("a.png", "", "keep")):
            with pytest.raises(ValueError, match="An answer has a sha256, and keep, reject or review"):
                append(tmp_path, [wrong])

    def test_several_people_lose_nothing(self, tmp_path):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: append(tmp_path, [Answer(f"{i}.png", f"{i}", "keep")]), range(80)))
        assert load(tmp_path) == {str(i): "keep" for i in range(80)}


class TestRemember:
    def test_by_content_and_once(self, manifest, tmp_path):
        path = remember(tmp_path / "out", manifest, answers(_0="reject", _3="keep"))
        remember(tmp_path / "out", manifest, answers(_0="keep", _3="keep", _5="reject"))
        sha256 = manifest.table.sha256
        assert load(tmp_path / "out") == {sha256[0]: "keep", sha256[3]: "keep", sha256[5]: "reject"}
        assert path.read_text().count("\n") == 1 + 4  # what was known is not said again
        before = path.read_bytes()
        remember(tmp_path / "out", manifest, read(path))
        assert path.read_bytes() == before

    def test_what_it_wrote_can_be_passed_as_decisions(self, manifest, tmp_path):
        decisions = answers(_0="reject", _3="keep")
        path = remember(tmp_path, manifest, decisions)
        again, direct = decide(manifest, read(path)), decide(manifest, decisions)
        pd.testing.assert_frame_equal(again.table, direct.table)

    def test_a_file_without_content_is_not_remembered(self, manifest, tmp_path):
        broken = Manifest(manifest.table.assign(sha256=""), manifest.run)
        remember(tmp_path, broken, answers(_0="reject"))
        assert load(tmp_path) == {}


def test_a_filled_in_template_is_understood(manifest, tmp_path):
    table = template(manifest)
    table.loc[0, "decision"] = "good"
    table.to_csv(tmp_path / "filled.csv", index=False)
    decisions = read(tmp_path / "filled.csv")
    assert decisions.image_path.tolist() == [table.image_path[0]]
    assert decide(manifest, decisions).counts["review"] == 1
