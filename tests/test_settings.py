import inspect
from dataclasses import fields

import pytest

from anomalib_metarefine import MetaRefine
from anomalib_metarefine.curation.curate import curate
from anomalib_metarefine.refinement.rules import RULES
from anomalib_metarefine.rule_settings import RULE_SETTINGS
from anomalib_metarefine.settings import Settings, parse_settings, seed_for, setting_help, setting_names


def test_metarefine_takes_every_setting_with_its_default():
    parameters = inspect.signature(MetaRefine.__init__).parameters
    for one in fields(Settings):
        assert parameters[one.name].default == one.default


def test_every_setting_is_documented_where_it_is_taken():
    for name in setting_names():
        assert setting_help(name) in (MetaRefine.__doc__ or "")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shrinkage": 5}, r"shrinkage must be a number in \[0, 1\], found 5"),
        ({"tail": -1}, r"tail must be a number in \(0, 1\]"),
        ({"tail": 0}, r"\(0, 1\]"),
        ({"trim": 1}, r"\[0, 1\)"),
        ({"rounds": -3}, "rounds must be a whole number of at least 0"),
        ({"rounds": 1.5}, "whole number"),
        ({"rounds": True}, "whole number"),
        ({"inner_lr": 0}, "above 0"),
        ({"inner_lr": float("nan")}, "above 0"),
        ({"meta_lr": float("inf")}, "above 0"),
        ({"meta_algorithm": "anil"}, "one of maml, fomaml, pretraining, found 'anil'"),
        ({"likelihood_weight": 0.0, "neighbour_weight": 0.0}, "one of them must be above 0"),
    ],
)
def test_what_cannot_be_used_says_what_was_found_and_what_is_expected(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
    with pytest.raises(ValueError, match=message):
        MetaRefine(pre_trained=False, **wrong)


@pytest.mark.parametrize(
    ("rule", "message"), [("nonsense", "no rejection rule"), ("share:0.65", "half of them are always kept")]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda rule: Settings(rule=rule),
        lambda rule: parse_settings([f"rule={rule}"]),
        lambda rule: MetaRefine(pre_trained=False, rule=rule),
        lambda rule: curate("nowhere", rule=rule),
    ],
)
def test_a_rule_that_is_none_is_refused_wherever_it_is_set(make, rule, message):
    with pytest.raises(ValueError, match=message):
        make(rule)


def test_every_rule_has_its_settings():
    assert set(RULES) == set(RULE_SETTINGS)


@pytest.mark.parametrize("text", ["shrinkage=5", "tail=-1", "rounds=-3", "rounds=many", "nonsense=1", "rounds"])
def test_settings_of_the_command_line(text):
    assert parse_settings(["rounds=2", "shrinkage=0.1"]) == Settings(rounds=2, shrinkage=0.1)
    with pytest.raises(ValueError, match=r"found|must be"):
        parse_settings([text])


def test_settings_of_other_parts_are_refused():
    assert parse_settings(["meta_steps=3"], "meta").meta_steps == 3
    with pytest.raises(ValueError, match="found 'rule=iqr'"):
        parse_settings(["rule=iqr"], "density", "meta")


def test_every_stage_has_a_seed_of_its_own_that_never_changes():
    assert seed_for(0, "references") == 8863237143869902072
    seeds = {seed_for(seed, stage) for seed in range(20) for stage in ("whitening", "meta-training", "references")}
    assert len(seeds) == 60
    assert all(0 <= seed < 2**63 for seed in seeds)
