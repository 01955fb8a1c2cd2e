"""The curation report: one HTML file that shows a person what was rejected, why, and what is left to decide.

Everything is inside the file (pictures, style, script), so that it opens on a machine without a network and can be sent
by mail. Numbers and geometry are computed here; ``report.html.j2`` only lays them out.
"""

from __future__ import annotations

import base64
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from anomalib_metarefine.curation.evidence import Evidence
    from anomalib_metarefine.curation.manifest import Manifest

_REJECTED_SHOWN, _REVIEW_SHOWN = 120, 60  # pictures in the report; the other images are listed by name
_REPAIRED_SHOWN = 12
_SIDE = 256  # pixels, longest side of the thumbnail of a square image
_PICTURE_BUDGET = 9 * 2**20  # bytes of all data URIs; the rest of a report of 10,000 rows takes up to 5 MB
_QUALITIES = ((256, 84), (256, 70), (192, 70), (128, 60))  # longest side and JPEG quality, until the budget holds
_COLOURMAP = "inferno"  # perceptually uniform: equal steps look equal, in grey print too
_DECISIONS = ("keep", "review", "reject")  # stacked in this order from the bottom
_PLOT = (46, 404, 18, 170)  # left, right, top and bottom of a histogram's axes in its 420 x 216 drawing
_STOPPED = {
    "converged": "the kept set no longer changed",
    "cycle": "the kept set came back to an earlier one and would have gone round in a circle",
    "rounds": "the allowed number of rounds was reached; the kept set was still changing",
    "off": "it was off; the images were scored once",
}
_NOT_STATED: dict[str, Any] = {  # a manifest made by hand need not say how it came about
    "contamination": None,
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
    """One image of the gallery: its manifest row, and itself, its anomaly map and its nearest kept image."""

    row: dict[str, Any]
    pictures: list[Picture]

    @property
    def wide(self) -> bool:
        """Whether the pictures are better set one above the other."""
        image = self.pictures[0].image
        return image is not None and image.width > 2 * image.height


@dataclass
class Group:
    """Cards under one heading, and how many images the heading stands for."""

    title: str
    total: int
    cards: list[Card] = field(default_factory=list)


def write_report(manifest: Manifest, evidence: Evidence, path: Path) -> Path:
    """Write the report.

    At most 120 rejected images (the worst of every group first) and 60 of the review queue are shown as pictures, all
    others are listed by name. Thumbnails shrink until the file stays below about 15 MB.

    Args:
        manifest (Manifest): Decisions. Images that have gone since then are said to be missing.
        evidence (Evidence): Anomaly maps, nearest kept images and groups.
        path (Path): Where to write; its folder is made if need be.

    Returns:
        Path: ``path``.
    """
    import jinja2

    table, run = manifest.table, {**_NOT_STATED, "source": manifest.run["root"], **manifest.run}
    rejected, review = _rows(manifest, "reject"), _rows(manifest, "review")
    scored = [row for row in rejected if math.isfinite(row["score"])]
    group_of = dict(zip(evidence.paths, evidence.groups, strict=True))
    worst = _worst_of_every_group([group_of.get(row["image_path"], -1) for row in scored], _REJECTED_SHOWN)
    cards = _cards([scored[i] for i in worst] + review[:_REVIEW_SHOWN], evidence, manifest.root)
    repairs = _repairs(manifest, evidence)
    _encode([picture for card in [*cards, *repairs] for picture in card.pictures if picture.image is not None])
    shown = set(worst)
    groups = _grouped(scored, group_of, cards[: len(worst)])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # file names may hold < > & "
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "likely": _likely, "number": _number, "count": "{:,}".format}
    html = environment.get_template("report.html.j2").render(
        run=run,
        verdict=manifest.verdict,
        counts=manifest.counts,
        stopped=_STOPPED.get(run["stop_reason"], run["stop_reason"]),
        histograms=_histograms(table, run["rounds"]),
        contamination=_contamination(run["contamination"], manifest.counts),
        groups=groups,
        rejected_rest=[row for i, row in enumerate(scored) if i not in shown],
        unreadable=[row for row in rejected if not math.isfinite(row["score"])],
        review=cards[len(worst) :],
        repairs=repairs,
        unusual=sum(manifest.table.image_path[manifest.table.decision != "reject"].isin(evidence.unusual_in)),
        review_rest=review[_REVIEW_SHOWN:],
        findings=_findings(table),
        flagged=table[table.quality != ""].to_dict("records"),
        colours=_colour_stops(),
        limits=evidence.limits,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file name that is no valid Unicode reaches us as lone surrogates, which UTF-8 can't hold.
    path.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def thumbnail(path: Path | BinaryIO) -> Image.Image:
    """A small 8-bit picture of any image file.

    Deep images (16-bit, float) are stretched between their 0.5 and 99.5 percentiles, transparent ones laid on mid-grey.
    Turned upright by EXIF, as the detector sees it: the anomaly map must fit. Every thumbnail has about
    the area of a square of 256 pixels, so that very wide images stay legible; none is enlarged.

    Args:
        path (Path | BinaryIO): Image file.

    Returns:
        Image.Image: Mode ``L`` or ``RGB``.

    Raises:
        OSError: If the file is missing or no image. Pillow raises other errors for some broken files.
    """
    with Image.open(path) as opened:
        longest, shortest = max(opened.size), min(opened.size)
        scale = min(1.0, _SIDE * min(3.0, math.sqrt(longest / shortest)) / longest)
        size = (max(1, round(opened.width * scale)), max(1, round(opened.height * scale)))
        opened.draft(None, (2 * size[0], 2 * size[1]))  # JPEG decodes at a fraction of its size, many times faster
        image: Image.Image = opened
        if image.mode.startswith(("I", "F")):
            values = np.nan_to_num(np.asarray(image, dtype=np.float32))
            low, high = np.percentile(values, [0.5, 99.5])
            stretched = (values - low) / max(high - low, 1e-12)
            image = Image.fromarray((255 * stretched.clip(0, 1)).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        image = ImageOps.exif_transpose(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0))
    if image.mode == "RGBA":
        backdrop = Image.new("RGBA", size, (128, 128, 128, 255))
        image = Image.alpha_composite(backdrop, image).convert("RGB")
    return image


def overlay(image: Image.Image, heat: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """The anomaly map laid over its image in grey; the hotter, the more it covers.

    Args:
        image (Image.Image): The thumbnail.
        heat (np.ndarray): ``[H x W]`` anomaly map; NaN counts as the lower limit.
        limits (tuple[float, float]): Values of the first and the last colour.

    Returns:
        Image.Image: Mode ``RGB``, size of ``image``.
    """
    import matplotlib as mpl

    low, high = limits
    value = (np.asarray(heat, dtype=np.float32) - low) / max(high - low, 1e-12)
    value = np.nan_to_num(value, nan=0.0).clip(0, 1)
    value = np.asarray(Image.fromarray(value).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour = mpl.colormaps[_COLOURMAP](value)[..., :3]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    cover = 0.72 * np.sqrt(value)[..., None]
    return Image.fromarray((255 * (cover * colour + (1 - cover) * grey)).round().astype(np.uint8))


def _rows(manifest: Manifest, decision: str) -> list[dict[str, Any]]:
    """Rows of one decision in the manifest's order, each with an ``id`` that is unique on the page."""
    rows = manifest.rows(decision)
    return rows.assign(id=rows.index).to_dict("records")


def _worst_of_every_group(groups: list[int], count: int) -> list[int]:
    """Positions of ``count`` images, worst first: the worst of each group, then the second of each, and so on."""
    if not groups:
        return []
    rank = pd.Series(groups).groupby(groups).cumcount()
    return sorted(rank.sort_values(kind="stable").index[:count].tolist())


def _grouped(rows: list[dict[str, Any]], group_of: dict[str, int], cards: list[Card]) -> list[Group]:
    """Cards by kind of defect, the largest kind first, those of no kind last."""
    sizes = pd.Series([group_of.get(row["image_path"], -1) for row in rows], dtype=int).value_counts(sort=False)
    order = sorted(sizes.index, key=lambda group: (group == -1, -sizes[group], group))
    titles = {group: f"Kind {i}" for i, group in enumerate(order, start=1)}
    titles[-1] = "Unlike the others" if len(order) > 1 else "Rejected images"
    groups = {group: Group(titles[group], int(sizes[group])) for group in order}
    for card in cards:
        groups[group_of.get(card.row["image_path"], -1)].cards.append(card)
    return list(groups.values())


def _cards(rows: list[dict[str, Any]], evidence: Evidence, root: Path) -> list[Card]:
    position = {path: i for i, path in enumerate(evidence.paths)}
    nearest = {path: other for path, other in zip(evidence.paths, evidence.nearest, strict=True) if other}
    wanted = {row["image_path"] for row in rows}
    wanted |= {nearest[path] for path in wanted if path in nearest}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        loaded = dict(zip(wanted, pool.map(_try_thumbnail, [root / name for name in wanted]), strict=True))
    cards = []
    for row in rows:
        name = row["image_path"]
        image = _picture("image", name, loaded[name])
        heat = Picture("anomaly map", f"Anomaly map of {name}", problem="No anomaly map was stored.")
        if image.image is None:
            heat.problem = "No image to lay the map on."
        elif name in position:
            heat.image = overlay(image.image, evidence.maps[position[name]], evidence.limits)
        other = Picture("nearest kept", "", problem="There is no kept image to compare with.")
        if name in nearest:
            other = _picture(
                f"nearest kept: {PurePosixPath(nearest[name]).name}",
                f"Nearest kept image: {nearest[name]}",
                loaded[nearest[name]],
            )
        cards.append(Card(row, [image, heat, other]))
    return cards


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
            unusual = overlay(image, repairer.mask(place), (0.0, 1.0))
            after = thumbnail(io.BytesIO(encoded(repairer.repair(place).image, ".tiff")))
            pictures = [("image", image), ("unusual", unusual), ("repaired", after)]
            cards.append(Card(row, [Picture(caption, f"{name}: {caption}", drawn) for caption, drawn in pictures]))
    except OSError:  # the report is written anew, and the images have gone since
        return []
    return cards


def _picture(caption: str, alt: str, loaded: Image.Image | str) -> Picture:
    if isinstance(loaded, str):
        return Picture(caption, alt, problem=loaded)
    return Picture(caption, alt, loaded)


def _try_thumbnail(path: Path) -> Image.Image | str:
    try:
        return thumbnail(path)
    except FileNotFoundError:
        return "The file is no longer there."
    except Exception as error:  # Pillow raises SyntaxError, struct.error and others for broken files
        return f"The file can't be read ({type(error).__name__})."


def _encode(pictures: list[Picture]) -> None:
    """Fill in the data URIs, in the best quality that keeps to the budget."""
    for side, quality in _QUALITIES:
        for picture in pictures:
            image = picture.image
            if side < _SIDE:
                size = (max(1, image.width * side // _SIDE), max(1, image.height * side // _SIDE))
                image = image.resize(size, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            picture.src = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if sum(len(picture.src) for picture in pictures) <= _PICTURE_BUDGET:
            return


def _histograms(table: pd.DataFrame, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One histogram per round, and one of the final scores."""
    fences = (table.score - table.fence_distance).dropna()
    final = float(fences.median()) if len(fences) else None
    series = [(f"Round {r['number']}", f"score_round_{r['number']}", r["fence"]) for r in rounds]
    series.append(("Final score", "score", final))
    drawn = [_histogram(title, table[column].to_numpy(float), table.decision, fence) for title, column, fence in series]
    return [histogram for histogram in drawn if histogram]


def _histogram(title: str, scores: np.ndarray, decisions: pd.Series, fence: float | None) -> dict[str, Any] | None:
    """Bars, ticks and the fence in the coordinates of the drawing; ``None`` if no score is finite.

    A long tail is drawn in the first and the last bar, so that the fence stays where one can see it.
    """
    from matplotlib.ticker import MaxNLocator

    finite = np.isfinite(scores)
    if not finite.any():
        return None
    scores, decisions = scores[finite], decisions.to_numpy()[finite]
    low, high = _limits(scores, fence)
    left, right, top, bottom = _PLOT
    bins = np.linspace(low, high, int(np.clip(2 * math.sqrt(len(scores)), 8, 36)) + 1)
    counts = [np.histogram(scores[decisions == name].clip(low, high), bins)[0] for name in _DECISIONS]
    highest = max(int(np.sum(counts, axis=0).max()), 1)

    def across(value: float) -> float:
        return round(left + (value - low) / (high - low) * (right - left), 1)

    bars = []
    width = round((right - left) / (len(bins) - 1) - 1, 2)
    for k, start in enumerate(bins[:-1]):
        y = float(bottom)
        for name, count in zip(_DECISIONS, counts, strict=True):
            if count[k]:
                height = max(2.0, count[k] / highest * (bottom - top))  # one image in 10,000 must still be seen
                y -= height
                bars.append(
                    {"kind": name, "x": across(start), "y": round(y, 1), "width": width, "height": round(height, 1)}
                )
    notes = [
        f"{beyond:,} score{'s' if beyond > 1 else ''} {side} {_number(edge)}, to {_number(extreme)}, in the {bar} bar."
        for beyond, side, edge, extreme, bar in (
            (int((scores < low).sum()), "below", low, scores.min(), "first"),
            (int((scores > high).sum()), "above", high, scores.max(), "last"),
        )
        if beyond
    ]
    inside = fence is not None and low <= fence <= high
    if fence is None:
        notes.append("No fence: nothing stood out.")
    elif not inside:
        notes.append(f"The fence, {_number(fence)}, is outside the picture.")
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    levels = MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]).tick_values(0, highest)
    return {
        "title": title,
        "bars": bars,
        "ticks": [(across(t), _tick(t)) for t in ticks if low <= t <= high],
        "levels": [
            (round(bottom - v / highest * (bottom - top), 1), f"{int(v):,}") for v in levels if 0 <= v <= highest
        ],
        "fence": (across(fence), _number(fence)) if inside else None,
        "past": int((scores > fence).sum()) if fence is not None else 0,
        "scores": len(scores),
        "median": float(np.median(scores)),
        "notes": notes,
    }


def _limits(scores: np.ndarray, fence: float | None) -> tuple[float, float]:
    """Range of the axis: the bulk of the scores and the fence, without long tails."""
    quarter, half = np.quantile(scores, [0.25, 0.5])
    low = max(scores.min(), quarter - 6 * (half - quarter)) if half > quarter else scores.min()
    high = scores.max()
    if fence is None:
        high = min(high, 2 * np.quantile(scores, 0.99) - low)
    elif fence > low:
        high = min(high, low + 4 * (fence - low))  # what lies inside the fence gets a quarter of the picture or more
        if high <= fence < 2 * high - low:  # a fence above all scores is drawn unless it would squeeze them
            high = fence + 0.05 * (fence - low)
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _contamination(share: dict[str, Any] | None, counts: dict[str, int]) -> dict[str, Any] | None:
    """The estimate in words and in shares of the axis' length; ``None`` where there is none."""
    if not share:
        return None
    total = sum(counts.values())
    rejected = counts["reject"] / total
    largest = max(share["high"], rejected)
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.25) if s >= largest / 4 or s == 0.25)
    end = min(1.0, step * math.ceil(largest * 1.05 / step + 1e-9))
    advice = "The rejected share lies inside this interval."
    if rejected < share["low"]:
        advice = (
            "Fewer images were rejected than are probably dirty: some dirty ones are likely left among the kept. "
            "Start with the review queue."
        )
    elif rejected > share["high"]:
        advice = (
            "More images were rejected than are probably dirty: some clean ones are likely among them. "
            "Look through the gallery, the last of each kind first."
        )
    return {
        **{name: share[name] / end for name in ("estimate", "low", "high")},
        "rejected": rejected / end,
        "rejected_share": rejected,
        "ticks": [(i * step / end, _percent(i * step)) for i in range(round(end / step) + 1)],
        "images": round(share["estimate"] * total),
        "advice": advice,
    }


def _findings(table: pd.DataFrame) -> list[tuple[str, int]]:
    """Kinds of quality findings with the number of images, most frequent first."""
    kinds = table.quality.str.split("; ").explode()
    kinds = kinds[kinds != ""].str.split(" of ").str[0]
    return [(kind, int(count)) for kind, count in kinds.value_counts().items()]


def _colour_stops() -> list[tuple[int, str]]:
    """Stops of the legend of the anomaly maps: per cent and colour."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return [(p, to_hex(mpl.colormaps[_COLOURMAP](p / 100))) for p in range(0, 101, 10)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def _likely(probability: float) -> str:
    """A probability in whole per cent, never called certain; an en dash where there is none."""
    if not math.isfinite(probability):
        return _number(probability)
    if probability > 0.99:
        return "> 99\N{NO-BREAK SPACE}%"
    return _percent(round(probability, 2)) if probability >= 0.01 else "< 1\N{NO-BREAK SPACE}%"


def _number(value: float, digits: int = 1) -> str:
    """With a true minus sign; an en dash where there is no value."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
