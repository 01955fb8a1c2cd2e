import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm

from anomalib_metarefine.refinement import posterior as contamination
from anomalib_metarefine.refinement.rules import (
    RULES,
    CountFence,
    FDRFence,
    MADFence,
    MixtureFence,
    ShareFence,
    ShorthFence,
    TukeyFence,
    get_rule,
)
from anomalib_metarefine.robust import lower_side_scale

# Rules that cannot go without a setting; all others are tested with their defaults.
EXAMPLES = {"count": "count:5"}
# Share of dirty scores that each rule withstands, as documented in its docstring and in docs/rules.md.
BREAKDOWN = {
    "auto": 0.5,
    "count": None,  # a number of images, not a share
    "fdr": 0.5,
    "iqr": 0.25,
    "mad": 0.5,
    "mixture": 0.5,
    "share": 0.1,
    "shorth": 0.5,
}
# Share of the images that each rule keeps by itself, whatever the scores; a rule not named keeps at least one image.
KEPT = {"fdr": 0.25, "iqr": 0.5, "mad": 0.5, "mixture": 0.5, "share": 0.9, "shorth": 0.25}
# In ranges of the clean scores above their maximum: no default rule whose fence is a multiple of a bounded spread
# goes further.
FURTHEST = 31.0

all_rules = pytest.mark.parametrize("name", sorted(RULES))
few_examples = settings(max_examples=40, deadline=None)
# Whole numbers: shift and scale are then exact, and ties (a flat training set) come up often.
scores = arrays(np.float64, st.integers(1, 60), elements=st.integers(-1000, 1000).map(float))


@pytest.fixture(autouse=True, scope="module")
def _short_chains():
    """The promises hold for chains of any length; full ones are tested in test_contamination.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "_STEPS", 150)
        patch.setattr(contamination, "_WARM_UP", 100)
        yield


def example(name: str):
    return get_rule(EXAMPLES.get(name, name))


def most_dirty(name: str, count: int) -> int:
    """The most dirty scores among ``count`` that the rule withstands."""
    return example(name).count if name == "count" else math.floor(BREAKDOWN[name] * (count - 1))


@all_rules
@few_examples
@given(values=scores, random=st.randoms())
def test_order_does_not_matter(name, values, random):
    shuffled = values.copy()
    random.shuffle(shuffled)
    assert example(name).fence(shuffled) == example(name).fence(values)


@all_rules
@few_examples
@given(values=scores, shift=st.integers(-100, 100), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_fence_moves_with_shift_and_scale(name, values, shift, scale):
    expected = scale * example(name).fence(values) + shift
    assert example(name).fence(scale * values + shift) == pytest.approx(expected, abs=1e-6)


@all_rules
@few_examples
@given(values=scores)
def test_keeps_what_it_guarantees(name, values):
    kept = (values <= example(name).fence(values)).sum()
    assert kept >= max(1, KEPT.get(name, 0) * len(values))


@all_rules
@given(count=st.integers(1, 50), value=st.floats(-5, 5))
def test_equal_scores_reject_nothing(name, count, value):
    assert example(name).fence(np.full(count, value)) == np.inf


@all_rules
@few_examples
@given(values=arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e6, 1e6, allow_subnormal=False)))
@pytest.mark.filterwarnings("error")
def test_fence_is_a_number(name, values):
    assert not math.isnan(example(name).fence(values))


@st.composite
def clean_and_far(draw, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Distinct clean scores, and as many arbitrarily high ones as the rule withstands, close together or not."""
    count = draw(st.integers(12, 60))
    dirty = most_dirty(name, count)
    clean = draw(arrays(np.float64, count - dirty, elements=st.integers(-1000, 1000).map(float), unique=True))
    return clean, draw(arrays(np.float64, dirty, elements=st.integers(10**9, 10**10).map(float), fill=st.nothing()))


@all_rules
@few_examples
@given(data=st.data())
def test_fence_stays_with_the_clean_scores_up_to_the_breakdown_point(name, data):
    clean, far = data.draw(clean_and_far(name))
    fence = example(name).fence(np.concatenate([clean, far]))
    # The mixture may see no two components in clean scores of just any shape; see the next test.
    assert fence <= clean.max() + FURTHEST * np.ptp(clean) or (name == "mixture" and fence == np.inf)


@all_rules
@pytest.mark.parametrize("seed", range(10))
def test_far_scores_are_all_rejected_up_to_the_breakdown_point(name, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(40, 400))
    dirty = most_dirty(name, count)
    values = np.concatenate([rng.normal(0, 1, count - dirty), 10 ** rng.uniform(3, 9, dirty)])
    assert (values > example(name).fence(values))[-dirty:].all()


@all_rules
def test_fence_leaves_with_the_dirty_scores_past_the_breakdown_point(name):
    count = 41
    dirty = most_dirty(name, count) + 1
    values = np.concatenate([np.arange(count - dirty), 1e9 + np.arange(dirty)])
    assert example(name).fence(values) > count * FURTHEST


def clean_and_dirty(share: float, count: int = 400) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(1)
    dirty = round(share * count)
    return np.concatenate([rng.normal(0, 1, count - dirty), rng.normal(40, 1, dirty)]), dirty


@pytest.mark.parametrize("rule", [ShorthFence(), FDRFence(), MixtureFence()])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.4, 0.45])
def test_robust_fences_hold_below_half(rule, share):
    values, dirty = clean_and_dirty(share)
    rejected = values > rule.fence(values)
    assert rejected[-dirty:].all()
    assert rejected[:-dirty].mean() < 0.05


@pytest.mark.parametrize("rule", [TukeyFence()])
def test_quartile_fences_break_down_past_a_quarter(rule):
    values, dirty = clean_and_dirty(0.3)
    assert not (values > rule.fence(values)).any()
    values, dirty = clean_and_dirty(0.2)
    assert (values > rule.fence(values))[-dirty:].all()


def test_fdr_fence_needs_more_evidence_for_one_outlier_than_for_many():
    rng = np.random.default_rng(0)
    clean = rng.normal(0, 1, 200)
    one, many = np.append(clean, 8.0), np.append(clean, np.full(60, 8.0))
    assert FDRFence().fence(one) >= 8.0
    assert FDRFence().fence(many) < 8.0


def test_scale_of_normal_scores():
    centre, spread = lower_side_scale(np.random.default_rng(0).normal(3, 2, 20_000))
    assert centre == pytest.approx(3, abs=0.4)
    assert spread == pytest.approx(2, rel=0.2)


def test_mad_fence_by_hand():
    # Median 3, absolute deviations 2, 1, 0, 1, 97.
    assert MADFence(k=2).fence(np.array([1.0, 2.0, 3.0, 4.0, 100.0])) == pytest.approx(3 + 2 * 1.4826)


@pytest.mark.parametrize(("share", "centre", "spread"), [(0.3, 8, 1), (0.1, 7, 1), (0.3, 7, 2), (0.2, 8, 0.5)])
def test_mixture_fence_is_where_both_components_are_equally_likely(share, centre, spread):
    rng = np.random.default_rng(0)
    upper = round(20_000 * share)
    values = np.concatenate([rng.normal(0, 1, 20_000 - upper), rng.normal(centre, spread, upper)])
    grid = np.linspace(0, centre, 10_001)
    upper_wins = share * norm.pdf(grid, centre, spread) > (1 - share) * norm.pdf(grid)
    assert MixtureFence().fence(values) == pytest.approx(grid[upper_wins.argmax()], abs=0.1)


def test_mixture_fence_is_infinite_where_a_narrow_component_lies_within_a_wide_one():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 600), rng.normal(-0.5, 4, 400)])
    assert MixtureFence().fence(values) == np.inf


def test_mixture_fence_finds_a_small_component_that_one_start_misses():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 1900), rng.normal(6, 1, 100)])
    # From halves alone the upper component ends as wide as the tail of the lower, with a fence of 2.5.
    assert MixtureFence().fence(values) == pytest.approx(3.5, abs=0.3)


@pytest.mark.parametrize("seed", range(40))
def test_mixture_fence_does_not_take_a_small_tie_for_a_component(seed):
    # Without the least variance of a component, 2 of these 40 are split.
    values = np.random.default_rng(seed).normal(0, 1, 300)
    assert MixtureFence().fence(np.append(values, np.full(8, 1.5))) == np.inf


@pytest.mark.parametrize("seed", range(5))
def test_mixture_fence_is_infinite_where_one_component_is_enough(seed):
    assert MixtureFence().fence(np.random.default_rng(seed).normal(5, 2, 300)) == np.inf


def test_mixture_fence_is_infinite_where_the_upper_component_is_the_majority():
    rng = np.random.default_rng(0)
    assert MixtureFence().fence(np.concatenate([rng.normal(0, 1, 120), rng.normal(8, 1, 180)])) == np.inf


def test_mixture_fence_needs_ten_scores():
    values = np.concatenate([np.arange(8.0), [100.0, 101.0]])
    assert np.isfinite(MixtureFence().fence(values))
    assert MixtureFence().fence(values[1:]) == np.inf


@given(arrays(np.float64, st.integers(1, 60), elements=st.integers(-1000, 1000).map(float), unique=True), st.data())
@few_examples
def test_share_and_count_reject_exactly_as_many_as_asked(values, data):
    count = data.draw(st.integers(0, len(values) - 1))
    shares = [ShareFence(count / len(values))] if count <= len(values) / 2 else []
    for rule in (CountFence(count), *shares):
        rejected = values > rule.fence(values)
        assert set(values[rejected]) == set(np.sort(values)[len(values) - count :])


@given(scores, st.integers(0, 70))
@few_examples
def test_ties_never_cost_more_images_than_asked(values, count):
    rejected = values > CountFence(count).fence(values)
    assert rejected.sum() <= count
    # All that ties with no kept score is rejected: only the tie across the fence is spared.
    asked = np.sort(values)[::-1][: min(count, len(values) - 1)]
    assert rejected.sum() >= len(asked) - (values == asked.min(initial=np.inf)).sum()


def test_share_is_a_share_of_the_images_whatever_its_binary_fraction():
    assert (np.arange(100) > ShareFence(0.29).fence(np.arange(100))).sum() == 29


def test_ties_across_the_fence_are_kept():
    values = np.array([1.0, 2.0, 5.0, 5.0, 5.0, 9.0])
    assert CountFence(3).fence(values) == 5
    assert CountFence(1).fence(values) == 5
    assert CountFence(4).fence(values) == 2


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("fdr", FDRFence()),
        ("iqr:whisker=3", TukeyFence(3.0)),
        ("share:share=0.2", ShareFence(0.2)),
        ("share:0.2", ShareFence(0.2)),
        ("count:12", CountFence(12)),
        (" fdr : 0.05 , tail = 2 ", FDRFence(0.05, 2.0)),
        ("fdr:tail=2,level=0.05", FDRFence(0.05, 2.0)),
        ("mixture", MixtureFence()),
    ],
)
def test_spec(spec, rule):
    assert get_rule(spec) == rule


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("iqrr", rf"no rejection rule 'iqrr'.*{re.escape(str(sorted(RULES)))}"),
        ("", "no rejection rule ''"),
        ("iqr:wisker=3", r"'iqr:wisker=3'.*found 'wisker=3'.*Settings of 'iqr', with defaults: whisker=1.5"),
        ("iqr:", r"found ''.*whisker=1.5"),
        ("fdr:0.05,2", r"found '2'.*level=0.1, tail=1.6"),
        ("fdr:0.05,level=0.1", r"each once, found 'level=0.1'"),
        ("iqr:whisker=long", "whisker must be of type float, found 'long'"),
        ("iqr:whisker=0", "whisker of TukeyFence must be a finite number above 0, found 0.0.*whisker=1.5"),
        ("count", r"no default for count; write count=value.*with defaults: count\."),
        ("count:2.5", "count must be of type int, found '2.5'"),
        ("mixture:3", r"found '3'.*Settings of 'mixture', with defaults: none"),
    ],
)
def test_spec_that_cannot_be_used_says_what_was_found_and_what_is_expected(spec, message):
    with pytest.raises(ValueError, match=message):
        get_rule(spec)


@pytest.mark.parametrize(
    ("rule", "setting", "value"),
    [
        *[(TukeyFence, "whisker", value) for value in (0, -1, math.inf, math.nan)],
        (MADFence, "k", 0),
        (ShorthFence, "width", 0),
        (FDRFence, "level", 0),
        (FDRFence, "level", 1),
        (FDRFence, "tail", 0),
        (ShareFence, "share", -0.1),
        (ShareFence, "share", 0.51),
        (CountFence, "count", -1),
        (CountFence, "count", 2.5),
    ],
)
def test_settings_out_of_range(rule, setting, value):
    with pytest.raises(ValueError, match=f"{setting} of {rule.__name__} must be .*found {value}"):
        rule(**{setting: value})


@all_rules
def test_every_rule_has_its_section_in_the_docs(name):
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## `{name}`.*?(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert "Breakdown point" in section
    assert RULES[name].__name__ in section
