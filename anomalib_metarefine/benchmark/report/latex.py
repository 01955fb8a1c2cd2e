"""Tables in LaTeX, for any class, with the package booktabs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # these two would be read as belonging to the end of the row before
    "*": "{*}",
    "±": r"$\pm$",
} | {character: f"\\{character}" for character in "&%$#_{}"}
_SIZE = "\\scriptsize\n\\setlength{\\tabcolsep}{3pt}"


def escape(text: str) -> str:
    r"""Any text, so that LaTeX prints it as it is; letters beyond Latin ones need LuaLaTeX or XeLaTeX.

    Example:
        >>> print(escape("a_b: 5 ± 1 %"))
        a\_b: 5 $\pm$ 1 \%
    """
    escaped = "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))
    return re.sub("-(?=-)", "-{}", escaped)  # two would become a dash


def title(text: str) -> str:
    r"""A title of a column, broken at commas, so that long names don't make wide columns.

    Example:
        >>> print(title("MetaRefine, unrefined"))
        \shortstack[r]{MetaRefine,\\unrefined}
    """
    lines = ",\\\\".join(escape(text).split(", "))
    return f"\\shortstack[r]{{{lines}}}" if "," in lines else lines


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    labels: int,
    breaks: Collection[int],
    caption: str,
    notes: Sequence[str],
) -> str:
    """A floating table.

    Args:
        header (Sequence[str]): Titles of the columns; LaTeX, as all that follows.
        rows (Sequence[Sequence[str]]): Cells.
        labels (int): Columns from the left that hold words; the others are flush right.
        breaks (Collection[int]): Rows that have a line above.
        caption (str): Above the table.
        notes (Sequence[str]): Below it.

    Returns:
        str: A ``table`` environment.
    """
    body = []
    for place, row in enumerate(rows):
        if place in breaks and place:
            body.append(r"\midrule")
        body.append(f"{' & '.join(row)} \\\\")
    lines = [
        r"\begin{table}[htbp]", r"\centering", f"\\caption{{{caption}}}\\smallskip", _SIZE,
        r"\makebox[\textwidth][c]{%",  # may reach into the margins, evenly
        f"\\begin{{tabular}}{{{'l' * labels}{'r' * (len(header) - labels)}}}", r"\toprule",
        f"{' & '.join(header)} \\\\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}}",
    ]  # fmt: skip
    if notes:
        lines += [r"\par\smallskip\raggedright", *(f"{note}\\par" for note in notes)]
    return "\n".join([*lines, r"\end{table}"])
