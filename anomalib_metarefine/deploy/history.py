"""What a line has decided over time: scores, thresholds, drift and new models, from a results file alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_metarefine.deploy.page import table, write_page
from anomalib_metarefine.deploy.summary import in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_WIDTH, _HEIGHT, _MARGIN = 1000, 320, 50  # of the drawing
_BINS = 450  # so that a line of a million images is drawn as fast as one of a thousand


@dataclass
class Period:
    """Images that one model decided on, one after the other.

    Attributes:
        model (str): Its fingerprint.
        time (str): When it started.
        scores (list[float]): Raw.
        thresholds (list[float]): In force for each image.
        decisions (list[str]): About each image.
    """

    model: str = ""
    time: str = ""
    scores: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a results file of `watch`, images and events; damaged ones are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no line of `watch`.
    """
    found = False
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and ("event" in record or "path" in record):
                found = True
                yield record
    if not found:
        msg = f"{path} holds no results of `metarefine watch`. Expected a file of JSON lines that it has written."
        raise ValueError(msg)


def write_history(results: Path, page: Path) -> Path:
    """Draw a results file as one self-contained page.

    Args:
        results (Path): Of `metarefine watch`.
        page (Path): HTML file to write; replaced if it is there.

    Returns:
        Path: ``page``.

    Raises:
        FileNotFoundError: If there are no results.
        ValueError: If there are none of `watch` in it.
    """
    periods, marks, events, unreadable = _read(results)
    rows = [
        (
            period.time, period.model[:12], len(period.scores), period.decisions.count("anomalous"),
            period.decisions.count("uncertain"), f"{np.median(period.scores):.4g}", f"{period.thresholds[-1]:.4g}",
        )
        for period in periods
    ]  # fmt: skip
    names = ("since", "model", "images", "anomalous", "uncertain", "median score", "threshold at the end")
    listing = "".join(f"<li>{escape(text)}</li>" for text in events) or "<li>none</li>"
    body = (
        f'<p class="muted">{sum(row[2] for row in rows):,} images, {unreadable} unreadable.</p>'
        f'<div class="wide">{_drawing(periods, marks) if rows else ""}</div>{table(names, rows)}'
        f"<h2>Events</h2><ul>{listing}</ul>"
    )
    return write_page(page, f"History of {results.name}", body)


def _read(results: Path) -> tuple[list[Period], list[tuple[int, str]], list[str], int]:
    """Periods; images at which drift began and ended; events in words; images that could not be read."""
    periods, marks, events, unreadable, count = [Period()], [], [], 0, 0
    for record in read_results(results):
        kind, time = record.get("event"), str(record.get("time", ""))
        if kind == "start" and record.get("model") != periods[-1].model:
            periods.append(Period(str(record.get("model")), time))
            events.append(f"{time}: model {str(record.get('model'))[:12]} begins, at image {count + 1}.")
        elif kind in ("drift", "threshold"):
            events.append(f"{time}: {in_words(record)}")
            if kind == "drift":
                marks.append((count, "uncertain" if record["drifted"] else "normal"))
        elif kind is None and record.get("decision") is None:
            unreadable += 1
        elif kind is None:
            periods[-1].scores.append(record["raw_score"])
            periods[-1].thresholds.append(record["threshold"])
            periods[-1].decisions.append(record["decision"])
            count += 1
    return [period for period in periods if period.scores], marks, events, unreadable


def _drawing(periods: Sequence[Period], marks: Sequence[tuple[int, str]]) -> str:
    """Range and median of the scores along the line, the threshold, and where something happened."""
    scores = np.concatenate([period.scores for period in periods])
    thresholds = np.concatenate([period.thresholds for period in periods])
    low = min(scores.min(), thresholds.min())
    high = max(np.quantile(scores, 0.999), thresholds.max())
    scale = (_HEIGHT - 2 * _MARGIN) / ((high - low) or 1.0)

    def across(image: float) -> float:
        return round(_MARGIN + (_WIDTH - 2 * _MARGIN) * image / len(scores), 1)

    def up(score: float) -> float:
        return round(_HEIGHT - _MARGIN - scale * (min(score, high) - low), 1)

    parts, line = [], []
    for rows in np.array_split(np.arange(len(scores)), min(_BINS, len(scores))):
        x, part, limit = across(rows.mean()), scores[rows], thresholds[rows]
        kind = "anomalous" if (part > limit).any() else "normal"
        parts.append(f'<path d="M{x} {up(part.min()) + 1}V{up(part.max()) - 1}" stroke="var(--{kind})"/>')
        parts.append(f'<path d="M{x - 1} {up(np.median(part))}h2" stroke="var(--ink)"/>')
        line.append(f"{x},{up(limit[-1])}")
    for image, kind in marks:
        parts.append(f'<path d="M{across(image)} 10V{_HEIGHT - _MARGIN}" stroke="var(--{kind})" stroke-dasharray="4"/>')
    for start, period in zip(np.cumsum([0, *(len(p.scores) for p in periods[:-1])]), periods, strict=True):
        parts.append(f'<path d="M{across(start)} 10V{_HEIGHT - _MARGIN}" stroke="var(--muted)"/>')
        parts.append(f'<text x="{across(start) + 3}" y="20" fill="var(--muted)">{escape(period.model[:8])}</text>')
    labelled = (low, (low + high) / 2, high)
    parts += [f'<text x="2" y="{up(value) + 4}" fill="var(--muted)">{value:.3g}</text>' for value in labelled]
    text = "Scores along the line (range and median), threshold, models (grey) and drift (dashed)"
    parts.append(f'<text x="{_MARGIN}" y="{_HEIGHT - 15}" fill="var(--muted)">{text}</text>')
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--ink)"/>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" font-size="12" role="img" aria-label="{text}">'
        + "".join(parts)
        + "</svg>"
    )
