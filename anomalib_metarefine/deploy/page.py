"""Self-contained pages: style and pictures inside, so that they open without a network and can be sent by mail."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from PIL import Image

# Colours of the curation report: Okabe and Ito's palette.
_STYLE = """
:root { color-scheme: light dark; --page: #f5f6f7; --surface: #fff; --ink: #1a1f24; --muted: #515c66; --line: #d3d8dd;
  --normal: #0072b2; --uncertain: #e69f00; --anomalous: #d55e00; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #121518; --surface: #1b2024; --ink: #e9ecef;
  --muted: #a9b3bc; --line: #353d44; --normal: #56b4e9; --anomalous: #e8762b; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } figcaption, .muted { color: var(--muted); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; max-width: 18rem; } img { max-width: 100%; }
.wide { overflow-x: auto; } table { border-collapse: collapse; background: var(--surface); }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: right; } svg { background: var(--surface); }
"""


def write_page(path: Path, title: str, body: str) -> Path:
    """Write a page.

    Args:
        path (Path): File, in a folder that exists.
        title (str): Plain text.
        body (str): HTML; what is not ours in it is escaped.

    Returns:
        Path: ``path``.
    """
    html = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{escape(title)}</h1>{body}</body></html>
"""
    path.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def figure(image: Image.Image | None, caption: str) -> str:
    """A picture with its caption; the caption alone where there is no picture."""
    if image is None:
        return f"<figure><figcaption>{escape(caption)}</figcaption></figure>"
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=84)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts and numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
