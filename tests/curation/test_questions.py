from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_metarefine.curation.decisions import decide
from anomalib_metarefine.curation.questions import propose, template
from tests.curation.test_decisions import NAMES, VERDICTS, answers
from tests.curation.test_manifest import make_manifest


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "data" / name).write_bytes(bytes([i]))
    return tmp_path / "data"


def test_template(root):
    names = dict(zip(NAMES, VERDICTS, strict=True))
    manifest = make_manifest(root, names, dirty_probability=[0.5, 0.5, 0.9, 0.45, 0.5, 0.5])
    table = template(manifest)
    assert table.image_path.tolist() == ["3.png", "2.png"]
    assert table.decision.tolist() == ["", ""]
    assert table.decision_so_far.tolist() == ["review", "review"]
    assert template(manifest, ["5.png", "0.png"]).decision_so_far.tolist() == ["reject", "keep"]


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
