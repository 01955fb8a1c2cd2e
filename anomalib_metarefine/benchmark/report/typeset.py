"""One table as Markdown, by pandas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Notes(dict[str, int]):
    """Footnotes by their text, in the order they come up; the same text is set once.

    Example:
        >>> notes = Notes()
        >>> notes.mark("-", "no network"), notes.mark("90.1", ""), notes.mark("-", "no network")
        ('- [1]', '90.1', '- [1]')
    """

    def mark(self, text: str, note: str) -> str:
        """The text with the number of its footnote; without a footnote as it is."""
        return f"{text} [{self.setdefault(note, len(self) + 1)}]".lstrip() if note else text


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str  # above it
    lines: list[dict[str, str]]  # its rows, text by column
    text: str = ""  # what to know to read it
    notes: Mapping[str, int] = field(default_factory=dict)  # its footnotes; see `Notes`
    best: list[set[str]] = field(default_factory=list)  # for every row the columns that are bold; none if empty

    def markdown(self, level: int = 2) -> str:
        """Heading of a level, text, table and footnotes."""
        best = self.best or [set()] * len(self.lines)
        table = pipe_table(
            {name: f"**{text}**" if name in bold else text for name, text in line.items()}
            for line, bold in zip(self.lines, best, strict=True)
        )
        notes = [f"[{number}] {' '.join(note.split())}" for note, number in self.notes.items()]
        # Two spaces make a line break.
        return "\n\n".join(filter(None, [f"{'#' * level} {self.title}", self.text, table, "  \n".join(notes)])) + "\n"


def pipe_table(lines: Iterable[Mapping[str, str]]) -> str:
    r"""Rows of texts as a table in Markdown.

    Example:
        >>> print(pipe_table([{"a": "1 | 2", "b": "3"}]))
        | a      | b   |
        |:-------|:----|
        | 1 \| 2 | 3   |
    """
    frame = pd.DataFrame(list(lines)).fillna("").map(lambda text: text.replace("|", "\\|"))
    return frame.to_markdown(index=False, disable_numparse=True)


def spread(mean: float, deviation: float) -> str:
    """A share in per cent, with its standard deviation if there is one.

    Example:
        >>> spread(0.912, 0.004), spread(0.912, float("nan"))
        ('91.2 ± 0.4', '91.2')
    """
    text = f"{100 * mean:.1f}"
    return text if pd.isna(deviation) else f"{text} ± {100 * deviation:.1f}"
