"""What each rejection rule can be told, and how that is written: ``"auto:level=0.05,tail=2"``.

The rules themselves are in ``refinement/rules.py``. This much of them lies down here, so that `Settings` refuses a rule
that does not exist wherever it is made.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_REJECTED = 0.5  # share of the images: past it "normal" would no longer mean the majority


def _setting(valid: Callable[[Any], bool], expected: str, default: Any = MISSING) -> Any:  # noqa: ANN401
    metadata = {"valid": valid, "expected": expected}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def _positive(default: float) -> Any:  # noqa: ANN401
    return _setting(lambda value: 0 < value < math.inf, "a finite number above 0", default)


@dataclass(frozen=True)
class RuleSettings:
    """Settings of a rule, checked.

    Raises:
        ValueError: If one is out of range.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not one.metadata["valid"](value):
                msg = f"{one.name} must be {one.metadata['expected']}, found {value}."
                raise ValueError(msg)


@dataclass(frozen=True)
class AutoSettings(RuleSettings):
    """Of `FalseDiscoveryRate`."""

    level: float = _setting(lambda value: 0 < value < 1, "a share in (0, 1)", 0.1)
    tail: float = _positive(2.0)


@dataclass(frozen=True)
class CountSettings(RuleSettings):
    """Of `CountFence`."""

    count: int = _setting(lambda value: value >= 0 and value == int(value), "a whole number of at least 0")


@dataclass(frozen=True)
class IQRSettings(RuleSettings):
    """Of `TukeyFence`."""

    whisker: float = _positive(1.5)


@dataclass(frozen=True)
class MADSettings(RuleSettings):
    """Of `MADFence`."""

    k: float = _positive(3.0)


@dataclass(frozen=True)
class ShareSettings(RuleSettings):
    """Of `ShareFence`."""

    share: float = _setting(
        lambda value: 0 <= value <= MOST_REJECTED,
        "a share in [0, 0.5] (what is normal is what most images show, so half of them are always kept)",
        0.1,
    )


RULE_SETTINGS: dict[str, type[Any]] = {
    "auto": AutoSettings,
    "count": CountSettings,
    "iqr": IQRSettings,
    "mad": MADSettings,
    "share": ShareSettings,
}


def parse_rule(spec: str) -> tuple[str, dict[str, float]]:
    """A rule's name and all its settings, from the text that describes it.

    Args:
        spec (str): A name by itself or with settings: ``"iqr"``, ``"iqr:whisker=3"``, ``"auto:level=0.05,tail=2"``. The
            first setting may go without its name: ``"share:0.1"``.

    Raises:
        ValueError: If there is no rule of that name, or a setting is unknown, missing or out of range.

    Example:
        >>> parse_rule("auto:level=0.1")
        ('auto', {'level': 0.1, 'tail': 2.0})
    """
    name, colon, text = (part.strip() for part in spec.partition(":"))
    if name not in RULE_SETTINGS:
        msg = f"There is no rejection rule {name!r}. Choose one of {sorted(RULE_SETTINGS)}."
        raise ValueError(msg)
    kind = RULE_SETTINGS[name]
    try:
        settings = kind(**_values(text.split(",") if colon else [], kind))
    except ValueError as error:
        choices = ", ".join(f"{s.name}{'' if s.default is MISSING else f'={s.default}'}" for s in fields(kind))
        msg = f"Can't use {spec!r} as a rejection rule: {error} Settings of {name!r}, with defaults: {choices}."
        raise ValueError(msg) from error
    return name, vars(settings)


def _values(items: list[str], kind: type[Any]) -> dict[str, float]:
    names, types = [setting.name for setting in fields(kind)], get_type_hints(kind)
    values: dict[str, float] = {}
    for position, item in enumerate(items):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals and position == 0:
            name, text = names[0], name
        elif not equals or name not in names or name in values:
            msg = f"expected name=value of one of its settings, each once, found {item.strip()!r}."
            raise ValueError(msg)
        try:
            values[name] = types[name](text)
        except ValueError:
            msg = f"{name} must be of type {types[name].__name__}, found {text!r}."
            raise ValueError(msg) from None
    missing = [s.name for s in fields(kind) if s.default is MISSING and s.name not in values]
    if missing:
        msg = f"it has no default for {missing[0]}; write {missing[0]}=value after the colon."
        raise ValueError(msg)
    return values
