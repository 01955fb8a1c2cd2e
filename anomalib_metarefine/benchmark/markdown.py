"""Tables in Markdown."""

from __future__ import annotations

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
