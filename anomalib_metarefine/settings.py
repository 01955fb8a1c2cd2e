"""Every setting once: its default, its range, and what it does.

`MetaRefine`, `curate` and the command line take defaults, checks and help from here. A result can be made again from
the data, a seed and a `Settings`; ``run.json`` and checkpoints hold all three.
"""

from __future__ import annotations

import hashlib
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from anomalib_metarefine.rule_settings import parse_rule

Part = Literal["density", "meta", "score", "refinement"]


def _setting(
    default: float | str,
    part: Part,
    text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    open_ends: str = "",
) -> Any:  # noqa: ANN401
    """A field with its part, its line of help and its range; ``open_ends`` of ``"[)"`` leaves the upper end out."""
    limits = {"least": least, "most": most, "open": open_ends or "[]"}
    return field(default=default, metadata={"part": part, "help": text, **limits})


@dataclass(frozen=True)
class Settings:
    """What can be set of density, meta-learning, score and refinement.

    Raises:
        TypeError: If there is no setting of that name.
        ValueError: If a value is of the wrong type or out of range, or there is no such rule.

    Example:
        >>> Settings(shrinkage=5)
        Traceback (most recent call last):
        ...
        ValueError: shrinkage must be a number in [0, 1], found 5.
    """

    dimensions: int = _setting(128, "density", "channels of a whitened patch", least=2)
    blocks: int = _setting(4, "density", "coupling blocks of the flow", least=1)
    hidden: int = _setting(64, "density", "width of the coupling networks", least=1)
    shrinkage: float = _setting(
        0.2, "density", "weight of the pooled covariance in that of every grid position", least=0, most=1
    )
    tail: float = _setting(
        0.03, "density", "share of the patches that make the image score", least=0, most=1, open_ends="(]"
    )
    trim: float = _setting(
        0.1, "density", "share of the least likely patches that the flow does not learn from", least=0, most=1,
        open_ends="[)",
    )  # fmt: skip
    adaptation_steps: int = _setting(
        10, "density", "gradient steps from the meta-learned initialisation in every round", least=0
    )
    batch_patches: int = _setting(1024, "density", "patches per gradient step", least=1)

    meta_algorithm: Literal["maml", "fomaml", "pretraining"] = _setting(
        "maml", "meta", "how the initialisation is learned; fomaml is first-order, pretraining has no inner loop"
    )
    meta_backend: Literal["torch", "learn2learn"] = _setting("torch", "meta", "implementation; both compute the same")
    meta_steps: int = _setting(10, "meta", "outer steps; 0 starts from the untrained flow", least=0)
    episodes: int = _setting(2, "meta", "episodes per outer step", least=1)
    support_images: int = _setting(16, "meta", "images in a support set", least=1)
    inner_steps: int = _setting(2, "meta", "inner steps of an episode", least=1)
    inner_lr: float = _setting(
        0.1, "meta", "step size of the inner loop and of the adaptation in every round", least=0, open_ends="(]"
    )
    meta_lr: float = _setting(5e-4, "meta", "step size of the outer loop (Adam)", least=0, open_ends="(]")

    likelihood_weight: float = _setting(
        1.0, "score", "weight of the likelihood in the score that refinement rejects by", least=0
    )
    neighbour_weight: float = _setting(
        1.0, "score", "weight of the distance to the nearest other images in that score", least=0
    )
    neighbour_tail: float = _setting(
        0.02, "score", "share of the patches that make the distance of an image", least=0, most=1, open_ends="(]"
    )
    neighbour_window: int = _setting(
        1, "score", "patches at most this far off, in rows and columns, are compared", least=0
    )
    references: int = _setting(300, "score", "images that every image is compared with, at most", least=2)
    likeness_weight: float = _setting(
        0.25, "score", "weight of the likeness to suspicious images in the order of the images; 0 leaves it out",
        least=0,
    )  # fmt: skip

    structure: Literal["auto", "aligned", "anywhere", "unlike"] = _setting(
        "auto",
        "refinement",
        "what kind of folder it is: parts that lie alike, parts that lie anywhere, or images that share too little; "
        "but for the first, the density is a memory of patches",
    )
    variants: Literal["auto", "off", "folders", "column"] = _setting(
        "auto",
        "refinement",
        "variants of the product, each with statistics of its own: found, none, one a folder of images, or as the "
        "column `variant` of a table has it",
    )
    rule: str = _setting("auto", "refinement", "rejection rule, with its settings if need be; see docs/rules.md")
    rounds: int = _setting(4, "refinement", "rounds of refinement at most; 0 trains on everything", least=0)
    patch_fence: float = _setting(
        3.0, "refinement", "spreads from which on a region of a kept image is not learned from; 0 learns from all",
        least=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for one in fields(self):
            _check(one, types[one.name], getattr(self, one.name))
        parse_rule(self.rule)
        if self.likelihood_weight + self.neighbour_weight <= 0:
            msg = "likelihood_weight and neighbour_weight are both 0: one of them must be above 0."
            raise ValueError(msg)

    def as_dict(self) -> dict[str, Any]:
        """By name, for ``run.json`` and checkpoints."""
        return asdict(self)


def setting_names(*parts: Part) -> list[str]:
    """Names of the settings of some parts; of all parts if none is named."""
    return [one.name for one in fields(Settings) if not parts or one.metadata["part"] in parts]


def setting_help(name: str) -> str:
    """What a setting does, its range, and its default: a line of the command line's help and of the docs."""
    one = next(one for one in fields(Settings) if one.name == name)
    return f"{one.metadata['help']} ({_expected(one, get_type_hints(Settings)[name])}; default: {one.default})"


def settings_docstring(indent: int) -> str:
    """All settings as the ``Args`` of a docstring."""
    types = get_type_hints(Settings)
    kinds = {name: kind.__name__ if isinstance(kind, type) else "str" for name, kind in types.items()}
    lines = [f"{name} ({kinds[name]}): {setting_help(name)}" for name in setting_names()]
    return "\n".join(" " * indent + line for line in lines)


def parse_settings(items: list[str], *parts: Part) -> Settings:
    """Settings written as ``name=value``, as on the command line.

    Args:
        items (list[str]): E.g. ``["shrinkage=0.1", "rounds=2"]``.
        *parts (Part): Settings of other parts than these are refused; without any, all are taken.

    Raises:
        ValueError: If one is not written so, is not there, or is out of range.

    Example:
        >>> parse_settings(["rounds=2"]).rounds
        2
    """
    types, allowed = get_type_hints(Settings), setting_names(*parts)
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = (piece.strip() for piece in item.partition("="))
        if not equals or name not in allowed:
            msg = f"Expected NAME=VALUE with one of {', '.join(allowed)} as NAME, found {item!r}."
            raise ValueError(msg)
        try:
            values[name] = types[name](text) if types[name] in (int, float) else text
        except ValueError:
            msg = f"{name} must be {_expected(_field(name), types[name])}, found {text!r}."
            raise ValueError(msg) from None
    return Settings(**values)


def seed_for(seed: int, stage: str) -> int:
    """A seed of its own for every stage, so that what one stage draws does not depend on what ran before it.

    Args:
        seed (int): Of the run.
        stage (str): Name of the stage.

    Returns:
        int: In [0, 2**63).
    """
    digest = hashlib.sha256(f"{seed} {stage}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _field(name: str) -> Field:
    return next(one for one in fields(Settings) if one.name == name)


def _check(one: Field, kind: Any, value: object) -> None:  # noqa: ANN401
    if not _accepted(one, kind, value):
        msg = f"{one.name} must be {_expected(one, kind)}, found {value!r}."
        raise ValueError(msg)


def _accepted(one: Field, kind: Any, value: object) -> bool:  # noqa: ANN401
    if get_args(kind):
        return value in get_args(kind)
    if kind is str:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    least, most, ends = (one.metadata[key] for key in ("least", "most", "open"))
    above = least is None or value > least or (value == least and ends[0] == "[")
    below = most is None or value < most or (value == most and ends[1] == "]")
    return above and below and value not in (float("inf"), float("-inf"))


def _expected(one: Field, kind: Any) -> str:  # noqa: ANN401
    if get_args(kind):
        return f"one of {', '.join(get_args(kind))}"
    if kind is str:
        return "a text"
    noun = "a whole number" if kind is int else "a number"
    least, most, ends = (one.metadata[key] for key in ("least", "most", "open"))
    if least is not None and most is not None:
        return f"{noun} in {ends[0]}{least:g}, {most:g}{ends[1]}"
    return f"{noun} {'of at least' if ends[0] == '[' else 'above'} {least:g}"
