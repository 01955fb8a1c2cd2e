r"""Tables in files. What stands in a CSV file of ours is safe to open in a spreadsheet, and comes back as it was.

A spreadsheet takes a cell that begins with ``=``, ``+``, ``-`` or ``@`` for a formula, and file names may begin so
(OWASP, "CSV Injection"). Such a cell, and one with a control character, is written with an apostrophe in front;
control characters, semicolons and backslashes in it become ``\x`` and two hexadecimal digits. So every row is one
line, whatever the names. An apostrophe in front of any other cell is doubled.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pandas as pd

from anomalib_metarefine.images.storage import opened

if TYPE_CHECKING:
    from pathlib import Path

# The wide forms are formulas in some East Asian spreadsheets; after a semicolon a cell begins where it separates them.
_RISKY = re.compile(r"^['=+\-@＝＋－＠]|;\s*[=+\-@]|[\x00-\x1f\x7f]")  # noqa: RUF001
_ESCAPED = re.compile(r"[\x00-\x1f\x7f;\\]")


def quote_cell(text: str) -> str:
    r"""A cell that no spreadsheet takes for a formula.

    Example:
        >>> quote_cell("=a.png"), quote_cell("a.png"), quote_cell("'a.png")
        ("'=a.png", 'a.png', "''a.png")
    """
    return "'" + _ESCAPED.sub(lambda found: f"\\x{ord(found[0]):02x}", text) if _RISKY.search(text) else text


def unquote_cell(cell: str) -> str:
    """The text that `quote_cell` made the cell of."""
    if not cell.startswith("'"):
        return cell
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), cell[1:])


def table_text(table: pd.DataFrame, header: bool = True) -> str:
    """A table as the text of a CSV file, its text cells quoted."""
    quoted = {
        name: [quote_cell(cell) if isinstance(cell, str) else cell for cell in column]
        for name, column in table.items()
        if not pd.api.types.is_numeric_dtype(column)
    }
    return table.assign(**quoted).to_csv(index=False, header=header, lineterminator="\n")


def read_table(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file. All cells of a CSV file are text, so that a file called ``NA`` or ``007`` keeps its name.

    A spreadsheet's habits are forgiven: a byte-order mark, and semicolons in place of commas.

    Raises:
        ModuleNotFoundError: If a Parquet file is given and pyarrow is not installed.
        ValueError: If the file is no such table.
    """
    try:
        if path.suffix.lower() == ".parquet":
            with opened(path) as file:
                return pd.read_parquet(file)
        with opened(path) as file:
            header = file.readline().decode("utf-8-sig")
        separator = ";" if header.count(";") > header.count(",") else ","
        with opened(path) as file:
            table = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ImportError as error:
        msg = f"Reading {path} needs pyarrow. Run `pip install pyarrow`, or save the table as CSV."
        raise ModuleNotFoundError(msg) from error
    except (ValueError, OSError) as error:
        msg = f"{path} can't be read as a table ({error}). Expected UTF-8 text with commas, or Parquet."
        raise ValueError(msg) from error
    return table.apply(lambda column: column.map(unquote_cell, na_action="ignore"))
