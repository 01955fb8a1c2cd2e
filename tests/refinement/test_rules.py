import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalib_metarefine.refinement.rules import (
    RULES,
    CountFence,
    FalseDiscoveryRate,
    MADFence,
    ShareFence,
    TukeyFence,
    get_rule,
    q_values,
)
from anomalib_metarefine.refinement.scales import Scales
from anomalib_metarefine.robust import lower_side_scale

# A rule that cannot go without a setting; all others are tested with their defaults.
EXAMPLES = {"count": "count:5"}
# Share of dirty scores that each rule withstands, as its docstring says.
BREAKDOWN = {"auto": 0.5, "count": None, "iqr": 0.25, "mad": 0.5, "share": 0.1}
# Share of the images that each rule keeps by itself; one that is not named keeps at least one image.
KEPT = {"auto": 0.25, "iqr": 0.5, "mad": 0.5, "share": 0.9}

all_rules = pytest.mark.parametrize("name", sorted(RULES))
few_examples = settings(max_examples=40, deadline=None)
# Whole numbers: shift and scale are then exact, and ties (a flat training set) come up often.
scores = arrays(np.float64, st.integers(1, 60), elements=st.integers(-1000, 1000).map(float))


def rejected(name: str, values: np.ndarray) -> np.ndarray:
    """By a rule, where likeness says what the score says."""
    rule = get_rule(EXAMPLES.get(name, name))
    return rule.reject(Scales(values, likeness=values)).images


@all_rules
@few_examples
@given(values=scores, random=st.randoms())
def test_order_does_not_matter(name, values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    np.testing.assert_array_equal(rejected(name, values[order]), rejected(name, values)[order])


@all_rules
@few_examples
@given(values=scores, shift=st.integers(-100, 100), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_shift_and_scale_do_not_matter(name, values, shift, scale):
    np.testing.assert_array_equal(rejected(name, scale * values + shift), rejected(name, values))


@all_rules
@few_examples
@given(values=scores)
def test_keeps_what_it_guarantees(name, values):
    assert (~rejected(name, values)).sum() >= max(1, KEPT.get(name, 0) * len(values))


@all_rules
@few_examples
@given(values=scores)
def test_what_is_rejected_lies_past_the_fence_and_scores_highest(name, values):
    rule = get_rule(EXAMPLES.get(name, name))
    images, fence = rule.reject(Scales(values, likeness=values))
    np.testing.assert_array_equal(images, values > fence)


@all_rules
@given(count=st.integers(1, 50), value=st.floats(-5, 5))
def test_equal_scores_reject_nothing(name, count, value):
    assert not rejected(name, np.full(count, value)).any()


@all_rules
@pytest.mark.parametrize("seed", range(10))
def test_far_scores_are_all_rejected_up_to_the_breakdown_point(name, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(40, 400))
    dirty = 5 if BREAKDOWN[name] is None else math.floor(BREAKDOWN[name] * (count - 1))
    values = np.concatenate([rng.normal(0, 1, count - dirty), 10 ** rng.uniform(3, 9, dirty)])
    assert rejected(name, values)[-dirty:].all()


def test_the_papers_rule_breaks_down_past_a_quarter():
    rng = np.random.default_rng(1)
    for share, found in [(0.2, True), (0.3, False)]:
        dirty = round(share * 400)
        values = np.concatenate([rng.normal(0, 1, 400 - dirty), rng.normal(40, 1, dirty)])
        assert rejected("iqr", values)[-dirty:].all() == found


def test_fences_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert TukeyFence().reject(Scales(values)).fence == 7
    assert MADFence(k=2).reject(Scales(np.array([1.0, 2, 3, 4, 100]))).fence == pytest.approx(3 + 2 * 1.4826)
    assert ShareFence(share=0.4).reject(Scales(values)).images.tolist() == [False, False, False, True, True]
    assert CountFence(count=1).reject(Scales(values)).images.tolist() == [False] * 4 + [True]


class TestFalseDiscoveryRate:
    def test_needs_more_evidence_for_one_outlier_than_for_many(self):
        clean = np.random.default_rng(0).normal(0, 1, 200)
        assert not rejected("auto", np.append(clean, 8.0))[-1]
        assert rejected("auto", np.append(clean, np.full(60, 8.0)))[-60:].all()

    def test_holds_its_level_where_the_reference_is_true(self):
        rng, level, shares = np.random.default_rng(0), 0.2, []

        def witness():
            clean = np.concatenate([-np.abs(rng.normal(0, 1, 100)), rng.exponential(2.0, 100)])
            return np.append(rng.permutation(clean), rng.uniform(8, 20, 40))

        for _ in range(200):
            images = FalseDiscoveryRate(level=level).reject(Scales(witness(), witness())).images
            shares.append(images[:200].sum() / max(images.sum(), 1))
        assert np.mean(shares) < level

    def test_neither_witness_is_enough_by_itself(self):
        rng = np.random.default_rng(0)
        values = np.append(rng.normal(0, 1, 200), np.full(20, 30.0))
        alike = np.append(rng.normal(0, 1, 200), np.repeat([9.0, 0.0], 10))
        for one, other in ((values, alike), (alike, values)):
            images, fence = FalseDiscoveryRate().reject(Scales(one, other))
            assert np.flatnonzero(images).tolist() == list(range(200, 210))
            assert one[:200].max() <= fence < one[images].min()

    def test_two_witnesses_find_what_neither_finds(self):
        rng = np.random.default_rng(0)
        values, alike = (np.append(rng.normal(0, 1, 200), np.full(20, 7.0)) for _ in range(2))
        assert q_values(Scales(values))[-20:].max() > 0.1
        assert FalseDiscoveryRate().reject(Scales(values, alike)).images[-20:].all()

    def test_reads_the_scale_off_the_kept_images(self):
        rng = np.random.default_rng(0)
        values, alike = (np.append(rng.normal(0, 1, 200), rng.normal(6, 1, 160)) for _ in range(2))
        kept = np.arange(360) < 200
        found = [FalseDiscoveryRate().reject(Scales(values, alike, mask)).images for mask in (None, kept)]
        assert found[0].sum() < found[1].sum()
        assert not found[1][:200].any()

    def test_the_likelihood_is_no_witness(self):
        """It put 48 to 81 of 100 good polycrystalline cells among 150 monocrystalline ones past every limit."""
        rng = np.random.default_rng(0)
        values, alike = (np.append(rng.normal(0, 1, 150), rng.normal(20, 1, 100)) for _ in range(2))
        near = rng.normal(0, 1, 250).clip(max=1.5)
        assert FalseDiscoveryRate().reject(Scales(values, alike)).images[150:].sum() > 50
        assert not FalseDiscoveryRate().reject(Scales(values, alike, distance=near)).images.any()

    def test_rejects_no_image_whose_likeness_is_not_known(self):
        rng = np.random.default_rng(0)
        values, alike = (np.append(rng.normal(0, 1, 200), np.full(20, 30.0)) for _ in range(2))
        alike[::2] = math.nan
        assert np.flatnonzero(FalseDiscoveryRate().reject(Scales(values, alike)).images).tolist() == list(
            range(201, 220, 2)
        )

    def test_too_few_images_to_tell_or_too_little_in_common_reject_nothing(self):
        values = np.append(np.random.default_rng(0).normal(0, 1, 200), np.full(20, 30.0))
        for scales in (Scales(values), Scales(values, np.full(220, 99.0), comparable=False)):
            images, fence = FalseDiscoveryRate().reject(scales)
            assert not images.any()
            assert fence == math.inf


class TestQValues:
    @few_examples
    @given(values=scores)
    def test_never_rise_with_the_score(self, values):
        shares = q_values(Scales(values))
        assert ((shares >= 0) & (shares <= 1)).all()
        assert (np.diff(shares[np.argsort(values, kind="stable")]) <= 0).all()

    @few_examples
    @given(values=scores, level=st.floats(0.01, 0.9))
    def test_at_a_level_they_are_the_procedure_of_benjamini_and_hochberg(self, values, level):
        centre, spread = lower_side_scale(values)
        if spread == 0:
            return
        p_values = np.exp(-np.maximum(np.sort(values)[::-1] - centre, 0) / (1.6 * spread))
        passed = np.flatnonzero(p_values <= level * np.arange(1, len(values) + 1) / len(values))
        expected = np.sort(values)[::-1][passed[-1]] if len(passed) else math.inf
        found = values[q_values(Scales(values), 1.6) <= level]
        assert (found.min() if len(found) else math.inf) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("iqr", TukeyFence()),
        ("iqr:3", TukeyFence(whisker=3)),
        ("auto:level=0.05,tail=2", FalseDiscoveryRate(level=0.05, tail=2)),
        (" share : 0.1 ", ShareFence(share=0.1)),
        ("count:20", CountFence(count=20)),
    ],
)
def test_spec(spec, expected):
    assert get_rule(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "no rejection rule 'nonsense'.*auto"),
        ("iqr:whisker=0", "above 0"),
        ("iqr:whisker=wide", "type float"),
        ("iqr:whisker=1,whisker=2", "each once"),
        ("iqr:wide=1", "name=value"),
        ("count", "no default for count"),
        ("count:2.5", "type int"),
        ("share:0.65", r"half of them are always kept.*found 0.65"),
        ("share:-0.1", "share in"),
        ("auto:level=1", r"\(0, 1\)"),
        ("auto:tail=inf", "finite"),
    ],
)
def test_spec_that_cannot_be_used_says_what_was_found_and_what_is_expected(spec, message):
    with pytest.raises(ValueError, match=message):
        get_rule(spec)


@all_rules
def test_every_rule_has_its_section_and_its_breakdown_point_in_the_docs(name):
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {name}$.*?(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert RULES[name].__name__ in section
    (row,) = re.findall(rf"^\|[^|]*\b{name}\b[^|]*\|.*\|(.*)\|$", page, flags=re.MULTILINE)
    expected = {"count": "count / N", "share": "share"}.get(name, f"{BREAKDOWN[name] or 0:.0%}".replace("%", " %"))
    assert expected in row
