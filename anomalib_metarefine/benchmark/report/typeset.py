"""One table, set in Markdown and in LaTeX."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anomalib_metarefine.benchmark import markdown
from anomalib_metarefine.benchmark.report import latex

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST = 45  # rows on a page of LaTeX


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
        text (str): Not escaped.
        bold (bool): Whether it is the best.
        note (str): Footnote; the same text is set once.
    """

    text: str
    bold: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table that does not know how it will be set.

    Attributes:
        title (str): Above it.
        header (list[str]): Titles of its columns.
        rows (list[list[Cell | str]]): Its cells.
        labels (int): Columns from the left that hold words rather than numbers.
        text (str): What to know to read it.
        breaks (set[int]): Rows where something new begins.
    """

    title: str
    header: list[str]
    rows: list[list[Cell | str]]
    labels: int
    text: str = ""
    breaks: set[int] = field(default_factory=set)

    def markdown(self, level: int = 2) -> str:
        """Heading of a level, text, table and footnotes."""
        marks: dict[str, str] = {}
        rows = _set(self.rows, markdown.escape, "**{}**".format, "<sup>{}</sup>".format, marks)
        # Two spaces make a line break.
        notes = "  \n".join(f"<sup>{mark}</sup> {markdown.escape(note)}" for note, mark in marks.items())
        title, text, *header = map(markdown.escape, [self.title, self.text, *self.header])
        return (
            "\n\n".join(filter(None, [f"{'#' * level} {title}", text, markdown.markdown(header, rows), notes])) + "\n"
        )

    def latex(self) -> str:
        """A float, or several where one page would not hold it."""
        floats = []
        begins = range(0, max(len(self.rows), 1), _LONGEST)
        for begin in begins:
            marks: dict[str, str] = {}
            part = self.rows[begin : begin + _LONGEST]
            rows = _set(part, latex.escape, "\\textbf{{{}}}".format, "$^{{{}}}$".format, marks)
            caption = f"{self.title} (continued)" if begin else ". ".join(filter(None, [self.title, self.text]))
            notes = [f"$^{{{mark}}}$ {latex.escape(note)}" for note, mark in marks.items()]
            header = [*map(latex.escape, self.header[: self.labels]), *map(latex.title, self.header[self.labels :])]
            breaks = {place - begin for place in self.breaks}
            floats.append(latex.table(header, rows, self.labels, breaks, latex.escape(caption), notes))
        return "\n\n".join(floats) + "\n"


def _set(
    rows: list[list[Cell | str]],
    escape: Callable[[str], str],
    bold: Callable[[str], str],
    mark: Callable[[str], str],
    marks: dict[str, str],
) -> list[list[str]]:
    """Cells as text; ``marks`` collects footnotes in the order they come up."""

    def one(cell: Cell | str) -> str:
        if isinstance(cell, str):
            return escape(cell)
        text = bold(escape(cell.text)) if cell.bold else escape(cell.text)
        if not cell.note:
            return text
        return text + mark(marks.setdefault(cell.note, _letters(len(marks))))

    return [[one(cell) for cell in row] for row in rows]


def _letters(place: int) -> str:
    """``a``, ..., ``z``, ``aa``, ``ab``, ...

    Example:
        >>> _letters(0), _letters(25), _letters(26), _letters(52)
        ('a', 'z', 'aa', 'ba')
    """
    return (_letters(place // 26 - 1) if place >= 26 else "") + chr(ord("a") + place % 26)
