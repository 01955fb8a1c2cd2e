"""Tables in Markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def line(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def head(*titles: str) -> str:
    """The titles, and the line below them."""
    return f"{line(*titles)}\n{line(*('---' for _ in titles))}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A whole table.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    return "\n".join([head(*header), *(line(*row) for row in rows)])


def escape(text: str) -> str:
    r"""Any text, so that it reads as it is, in a table too.

    Example:
        >>> print(escape("__init__() | mvtec_ad"))
        \_\_init\_\_() \| mvtec_ad
    """
    text = re.sub(r"([\\`*<|\[\]])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it means nothing
