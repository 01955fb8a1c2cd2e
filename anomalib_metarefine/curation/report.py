"""The curation report: one HTML file with the most suspicious images first, why, and what is left to decide.

Everything is inside the file (pictures, style, script), so that it opens on a machine without a network and can be sent
by mail. Numbers and geometry are computed here; ``report.html.j2`` only lays them out.
"""

from __future__ import annotations

import base64
import io
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from anomalib_metarefine.curation.charts import histogram, number
from anomalib_metarefine.curation.pictures import SIDE, colour_stops, outline, overlay, thumbnail
from anomalib_metarefine.images.reading import UnreadableImageError

if TYPE_CHECKING:
    from anomalib_metarefine.curation.evidence import Evidence
    from anomalib_metarefine.curation.manifest import Manifest

_CARDS, _TILES = 24, 400  # images as large cards and as small tiles
_SHOWN = 500  # images at most, those by name among them: of a million, the worst
_TILE_SIDE = 160  # pixels
_REPAIRED_SHOWN = 12
_PICTURE_BUDGET = 9 * 2**20  # bytes of all data URIs; the rest of a report of 10,000 rows takes up to 5 MB
_QUALITIES = ((1.0, 84), (1.0, 70), (0.75, 70), (0.5, 60))  # scale and JPEG quality, until the budget holds
_STOPPED = {
    "converged": "the kept set no longer changed",
    "cycle": "the kept set came back to an earlier one and would have gone round in a circle",
    "rounds": "the allowed number of rounds was reached; the kept set was still changing",
    "off": "it was off; the images were scored once",
}
_NOT_STATED: dict[str, Any] = {  # a manifest made by hand need not say how it came about
    "rounds": [],
    "stop_reason": "not stated",
    "seed": "not stated",
    "created": "",
    "data": {"images": "not stated", "sha256": "not stated"},
    "settings": {},
    "versions": {},
    "seconds": {},
}


@dataclass
class Picture:
    """One picture of a card; ``problem`` says why there is none."""

    caption: str
    alt: str
    image: Image.Image | None = None
    problem: str = ""
    src: str = ""


@dataclass
class Card:
    """One image: its manifest row, and itself, its anomaly map and perhaps its nearest kept image."""

    row: dict[str, Any]
    pictures: list[Picture]

    @property
    def wide(self) -> bool:
        """Whether the pictures are better set one above the other."""
        image = self.pictures[0].image
        return image is not None and image.width > 2 * image.height


@dataclass
class Group:
    """Tiles under one heading."""

    title: str
    cards: list[Card] = field(default_factory=list)


def write_report(manifest: Manifest, evidence: Evidence, path: Path, folder: Path | None = None) -> Path:
    """Write the report.

    The 24 highest scores are shown as cards whatever was decided, then up to 400 other images that are rejected or to
    be reviewed as tiles; the next are listed by name, up to the worst 500 in all, and it says how many more there are.
    Pictures shrink until the file stays below about 15 MB.

    Args:
        manifest (Manifest): Decisions. Images that have gone since then are said to be missing.
        evidence (Evidence): Anomaly maps, nearest kept images and groups.
        path (Path): Where to write; its folder is made if need be.
        folder (Path | None): Of the run, for the commands that the report shows; ``None`` takes the one of ``path``.

    Returns:
        Path: ``path``.
    """
    import jinja2

    path = Path(path)
    table, run = manifest.table, {**_NOT_STATED, "source": manifest.run["root"], **manifest.run}
    by_score = table.sort_values("score", ascending=False, kind="stable")
    scored = np.isfinite(by_score.score)
    first, rest = by_score[scored][:_CARDS], by_score[scored][_CARDS:]
    others = rest[rest.decision != "keep"]
    flagged = by_score[by_score.quality != ""]
    pictures = _Pictures(evidence, manifest.root)
    cards = pictures.cards(first.to_dict("records"), SIDE, with_nearest=True)
    tiles = pictures.cards(others[:_TILES].to_dict("records"), _TILE_SIDE, with_nearest=False)
    repairs = _repairs(manifest, evidence)
    _encode([picture for card in [*cards, *tiles, *repairs] for picture in card.pictures])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # file names may hold < > & "
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "count": "{:,}".format}
    html = environment.get_template("report.html.j2").render(
        run=run,
        folder=shlex.quote(str((folder or path.parent).resolve())),
        key=f"{run['data']['sha256']} {run['created']}",
        headline=manifest.headline,
        verdict=manifest.verdict.removeprefix(manifest.headline).strip(),
        counts=manifest.counts,
        variants=table.variant.nunique(),
        stopped=_STOPPED.get(run["stop_reason"], run["stop_reason"]),
        histogram=histogram(table),
        cards=cards,
        groups=_grouped(tiles, dict(zip(evidence.paths, evidence.groups, strict=True))),
        by_name=_names(others[_TILES:], _SHOWN - _CARDS - _TILES),
        unreadable=_names(by_score[~scored]),
        repairs=repairs,
        unusual=sum(table.image_path[table.decision != "reject"].isin(evidence.unusual_in)),
        findings=_findings(table),
        flagged=_names(flagged),
        colours=colour_stops(),
        limits=evidence.limits,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name that is no valid Unicode reaches us as lone surrogates, which UTF-8 can't hold.
    path.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _names(rows: pd.DataFrame, limit: int = _SHOWN) -> dict[str, Any]:
    """The first rows of a list, and how many there are."""
    return {"rows": rows[:limit].to_dict("records"), "count": len(rows), "left": max(0, len(rows) - limit)}


class _Pictures:
    def __init__(self, evidence: Evidence, root: Path) -> None:
        self._root, self._limits = root, evidence.limits
        self._maps = dict(zip(evidence.paths, evidence.maps, strict=True))
        self._nearest = {path: other for path, other in zip(evidence.paths, evidence.nearest, strict=True) if other}

    def cards(self, rows: list[dict[str, Any]], side: int, *, with_nearest: bool) -> list[Card]:
        wanted = {row["image_path"] for row in rows}
        if with_nearest:
            wanted |= {self._nearest[name] for name in wanted if name in self._nearest}
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            made = pool.map(lambda name: _try_thumbnail(self._root / name, side), wanted)
            loaded = dict(zip(wanted, made, strict=True))
        return [Card(row, self._of(row["image_path"], loaded, with_nearest)) for row in rows]

    def _of(self, name: str, loaded: dict[str, Image.Image | str], with_nearest: bool) -> list[Picture]:
        image = _picture("image", name, loaded[name])
        pictures = [image]
        if name in self._maps:
            heat = Picture("anomaly map", f"Anomaly map of {name}", problem="No image to lay the map on.")
            if image.image is not None:
                heat.image = overlay(image.image, self._maps[name], self._limits)
            pictures.append(heat)
        if with_nearest and name in self._nearest:
            other = self._nearest[name]
            caption = f"nearest kept: {PurePosixPath(other).name}"
            pictures.append(_picture(caption, f"Nearest kept image: {other}", loaded[other]))
        return pictures


def _grouped(tiles: list[Card], group_of: dict[str, int]) -> list[Group]:
    """Tiles by kind of defect, the largest kind first, those of no kind last; highest scores first within each."""
    kinds = pd.Series([group_of.get(card.row["image_path"], -1) for card in tiles], dtype=int)
    sizes = kinds.value_counts(sort=False)
    order = sorted(sizes.index, key=lambda kind: (kind == -1, -sizes[kind], kind))
    titles = {kind: f"Kind {i}" for i, kind in enumerate(order, start=1)}
    titles[-1] = "Unlike the others" if len(order) > 1 else "Other suspicious images"
    groups = {kind: Group(titles[kind]) for kind in order}
    for card, kind in zip(tiles, kinds, strict=True):
        groups[kind].cards.append(card)
    return list(groups.values())


def _repairs(manifest: Manifest, evidence: Evidence) -> list[Card]:
    """Images that are not rejected, what is unusual in them, and what repair makes of it; the worst first."""
    rows = manifest.table[(manifest.table.decision != "reject") & (manifest.table.sha256 != "")]
    if not rows.image_path.isin(evidence.unusual_in).any():
        return []
    from anomalib_metarefine.curation.repair import Repairer, encoded

    cards = []
    try:
        repairer = Repairer.of(rows.image_path.tolist(), manifest.paths(rows), evidence)
        for place in repairer.spoilt[:_REPAIRED_SHOWN]:
            row = rows.iloc[place].to_dict()
            name, image = row["image_path"], thumbnail(manifest.root / row["image_path"])
            after = thumbnail(encoded(repairer.repair(place).image, ".tiff"))
            pictures = [("unusual places", outline(image, repairer.mask(place))), ("repaired", after)]
            cards.append(Card(row, [Picture(caption, f"{name}: {caption}", drawn) for caption, drawn in pictures]))
    except OSError:  # the report is written anew, and the images have gone since
        return []
    return cards


def _picture(caption: str, alt: str, loaded: Image.Image | str) -> Picture:
    if isinstance(loaded, str):
        return Picture(caption, alt, problem=loaded)
    return Picture(caption, alt, loaded)


def _try_thumbnail(path: Path, side: int) -> Image.Image | str:
    try:
        return thumbnail(path, side)
    except FileNotFoundError:
        return "The file is no longer there."
    except (OSError, UnreadableImageError) as error:
        return f"The file can't be read ({getattr(error, 'reason', error)})."


def _encode(pictures: list[Picture]) -> None:
    """Fill in the data URIs, in the best quality that keeps to the budget."""
    drawn = [picture for picture in pictures if picture.image is not None]
    for scale, quality in _QUALITIES:
        for picture in drawn:
            image = picture.image
            if scale < 1:
                size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
                image = image.resize(size, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            picture.src = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if sum(len(picture.src) for picture in drawn) <= _PICTURE_BUDGET:
            return


def _findings(table: pd.DataFrame) -> list[tuple[str, int]]:
    """Kinds of quality findings with the number of images, most frequent first."""
    kinds = table.quality.str.split("; ").explode()
    kinds = kinds[kinds != ""].str.split(" of ").str[0]
    return [(kind, int(count)) for kind, count in kinds.value_counts().items()]
