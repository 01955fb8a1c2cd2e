from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.curation.decisions import (
    decide,
    load_remembered,
    propose,
    read_decisions,
    remember,
    review_queue,
    template,
)
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.refinement.posterior import estimate_contamination
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
        words = ["keep", " Good", "OK", "clean", "normal", "reject", "BAD ", "ng", "dirty", "Defective", "anomalous"]
        rows = [f"{i}.png,{word}" for i, word in enumerate([*words, "", "review"])]
        (tmp_path / "d.csv").write_text("image_path,decision\n" + "\n".join(rows) + "\n")
        table = read_decisions(tmp_path / "d.csv")
        assert table.decision.tolist() == ["keep"] * 5 + ["reject"] * 6
        assert table.columns.tolist() == ["sha256", "image_path", "decision"]
        assert table.image_path.iloc[-1] == "10.png"

    def test_by_hash_alone(self, tmp_path):
        (tmp_path / "d.csv").write_text("decision;sha256\r\nkeep;ABC\r\n")
        assert read_decisions(tmp_path / "d.csv").to_numpy().tolist() == [["abc", "", "keep"]]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "image_path,decision\na,perhaps\nb,keep\n",
                "not understood: perhaps. Write one of keep",
            ),
            ("path,decision\na,keep\n", "needs a column decision, and image_path or sha256; found path, decision"),
            ("image_path\na\n", "needs a column decision"),
            ("image_path,sha256,decision\n,,keep\n", "1 decisions with neither image_path nor sha256"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, text, message):
        (tmp_path / "d.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_decisions(tmp_path / "d.csv")

    def test_refuses_a_manifest(self, manifest, tmp_path):
        with pytest.raises(ValueError, match="is a manifest. Pass a file with only"):
            read_decisions(manifest.write(tmp_path))
        with pytest.raises(FileNotFoundError, match="no decisions at"):
            read_decisions(tmp_path / "none.csv")


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

    def test_estimates_the_contamination_anew(self, root):
        rng = np.random.default_rng(0)
        names = [f"{i:03d}.png" for i in range(60)]
        for name in names:
            (root / name).write_bytes(name.encode())
        scores = [*rng.exponential(1, 59), np.nan]  # the last can't be read
        manifest = make_manifest(root, dict.fromkeys(names, "keep"), score=scores)
        manifest.run |= {"contamination": estimate_contamination(np.array(scores[:59])).summary(), "seed": 0}
        highest = np.argsort(-np.array(scores))[:12]
        decisions = pd.DataFrame({"sha256": "", "image_path": [names[i] for i in highest], "decision": "reject"})
        decided = decide(manifest, decisions)
        before, after = manifest.run["contamination"], decided.run["contamination"]
        assert before["low"] < 0.1 < 12 / 60 <= after["low"]
        assert decided.table.dirty_probability[highest].tolist() == [1] * 12
        assert "with your 12 answers: " in decided.verdict
        clean = decide(manifest, decisions.assign(decision="keep"))
        assert clean.run["contamination"]["high"] < before["high"]
        assert "contamination" not in decide(make_manifest(root, {"0.png": "keep"}), answers(_0="reject")).run
        combined, resembling = rng.exponential(1, (2, 60))
        scales = {"score_combined": combined, "score_resembling": resembling}
        on_three = decide(Manifest(manifest.table.assign(**scales), manifest.run), decisions)
        known = dict.fromkeys(highest.tolist(), False)
        expected = estimate_contamination(np.array(scores[:59]), 0, known, [combined[:59], resembling[:59]]).summary()
        assert on_three.run["contamination"] == expected != after


class TestRemember:
    def test_the_last_one_wins(self, manifest, tmp_path):
        assert load_remembered(tmp_path / "out") == {}
        path = remember(tmp_path / "out", manifest, answers(_0="reject", _3="keep"))
        remember(tmp_path / "out", manifest, answers(_0="keep", _5="reject"))
        sha256 = manifest.table.sha256
        assert load_remembered(tmp_path / "out") == {sha256[0]: "keep", sha256[3]: "keep", sha256[5]: "reject"}
        table = pd.read_csv(path)
        assert table.columns.tolist() == ["sha256", "image_path", "decision", "decided_at"]
        assert pd.to_datetime(table.decided_at).dt.tz is not None

    def test_what_it_wrote_can_be_passed_as_decisions(self, manifest, tmp_path):
        decisions = answers(_0="reject", _3="keep")
        path = remember(tmp_path, manifest, decisions)
        again, direct = decide(manifest, read_decisions(path)), decide(manifest, decisions)
        pd.testing.assert_frame_equal(again.table, direct.table)

    def test_a_file_without_content_is_not_remembered(self, manifest, tmp_path):
        broken = Manifest(manifest.table.assign(sha256=""), manifest.run)
        remember(tmp_path, broken, answers(_0="reject"))
        assert load_remembered(tmp_path) == {}

    def test_a_damaged_file(self, tmp_path):
        (tmp_path / "decisions.csv").write_text("sha256,decision\nabc,keep\n")
        with pytest.raises(ValueError, match="decisions.csv is damaged: expected the columns sha256, image_path"):
            load_remembered(tmp_path)


def test_queue_and_template(root):
    names = dict(zip(NAMES, VERDICTS, strict=True))
    manifest = make_manifest(root, names, dirty_probability=[0.5, 0.5, 0.9, 0.45, 0.5, 0.5])
    assert review_queue(manifest).image_path.tolist() == ["3.png", "2.png"]
    table = template(manifest)
    assert table.image_path.tolist() == ["3.png", "2.png"]
    assert table.decision.tolist() == ["", ""]
    assert table.decision_so_far.tolist() == ["review", "review"]
    assert template(manifest, ["5.png", "0.png"]).decision_so_far.tolist() == ["reject", "keep"]


def test_a_filled_in_template_is_understood(manifest, tmp_path):
    table = template(manifest)
    table.loc[0, "decision"] = "good"
    table.to_csv(tmp_path / "filled.csv", index=False)
    decisions = read_decisions(tmp_path / "filled.csv")
    assert decisions.image_path.tolist() == [table.image_path[0]]
    assert decide(manifest, decisions).counts["review"] == 1


class TestPropose:
    @pytest.fixture
    def unsure(self, root):
        names = dict(zip(NAMES, VERDICTS, strict=True))
        return make_manifest(root, names, dirty_probability=[0.1, 0.4, 0.5, 0.48, 0.52, 0.95])

    def test_asks_first_about_what_may_have_been_missed(self, unsure):
        verdicts = unsure.table.decision.tolist()
        probability = unsure.table.dirty_probability.to_numpy()
        missed = [i for i in np.argsort(-probability) if verdicts[i] != "reject"]
        doubted = [i for i in np.argsort(probability) if verdicts[i] == "reject"]
        assert missed
        assert doubted
        expected = [f"{i}.png" for i in [*missed, *doubted]]
        assert propose(unsure, 100) == expected
        assert propose(unsure, 2) == expected[:2]

    def test_spreads_over_look_alikes(self, unsure):
        unsure.table["decision"] = "keep"
        groups = {"2.png": 7, "3.png": 7, "4.png": 7, "1.png": -1, "0.png": -1}
        # Gains 0.95, 0.52, 0.4, 0.5 / 2, 0.48 / 3, 0.1
        assert propose(unsure, 6, groups) == ["5.png", "4.png", "1.png", "2.png", "3.png", "0.png"]

    def test_not_about_what_is_known(self, unsure):
        first, second, third = propose(unsure, 3)
        decided = decide(unsure, answers(**{f"_{first[0]}": "keep"}))
        assert propose(decided, 1) == [second]
        decided.table.loc[int(second[0]), ["decided_by", "decision"]] = ["unreadable", "reject"]
        assert propose(decided, 1) == [third]

    def test_nothing_to_ask(self, unsure):
        unsure.table["decided_by"] = "user"
        assert propose(unsure, 3) == []
        with pytest.raises(ValueError, match="at least 1 image, found 0"):
            propose(unsure, 0)

    @given(
        st.lists(st.tuples(st.floats(0, 1), st.integers(-1, 2)), min_size=1, max_size=12, unique=True),
        st.integers(1, 12),
    )
    @settings(max_examples=30, deadline=None)
    def test_is_greedy_in_the_discounted_gain(self, images, budget):
        names = [f"{i:02d}.png" for i in range(len(images))]
        probability = {name: p for name, (p, _) in zip(names, images, strict=True)}
        groups = {name: group for name, (_, group) in zip(names, images, strict=True)}
        verdicts = dict.fromkeys(names, "keep")
        manifest = make_manifest(Path("/nowhere"), verdicts, dirty_probability=list(probability.values()))
        chosen = propose(manifest, budget, groups)
        assert len(chosen) == len(set(chosen)) == min(budget, len(names))
        asked: list[int] = []
        for name in chosen:
            rest = [n for n in names if n not in chosen[: len(asked)]]
            gains = {n: probability[n] / (1 + _times(groups[n], asked)) for n in rest}
            assert gains[name] == pytest.approx(max(gains.values()), abs=1e-12)
            asked.append(groups[name])


def _times(group, asked):
    return asked.count(group) if group >= 0 else 0
