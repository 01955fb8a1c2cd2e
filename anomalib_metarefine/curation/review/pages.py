"""The pages of a review, in a log that only grows: the bound needs to know what was drawn, even after a kill."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

PAGES_FILE = "review_pages.jsonl"


@dataclass(frozen=True)
class Page:
    """Images shown together.

    Attributes:
        number (int): Place in the log.
        client (str): The browser tab that it was handed to.
        images (list[int]): In the order shown.
        audit (list[int]): Those drawn at random.
        kind (str): "order"; "alike" for a group that a person asked for; "again" for images left undecided.
    """

    number: int
    client: str
    images: list[int]
    audit: list[int]
    kind: str


class Entry(NamedTuple):
    """One line of the log.

    Attributes:
        kind (str): As of a page; "given" for answers from elsewhere, which nobody was shown.
        client (str): As of a page.
        drawn_from (str): Hash of all images that there were: draws from fewer images say nothing about new ones.
        queue (list[str]): SHA-256 of the images in order.
        audit (list[str]): SHA-256 of those drawn at random, after them.
    """

    kind: str
    client: str
    drawn_from: str
    queue: list[str]
    audit: list[str]


def append_page(folder: Path, entry: Entry) -> None:
    """Add a page; it is on the disk when this returns. Half a line that a kill has left stays a line of its own."""
    with (folder / PAGES_FILE).open("a+b", buffering=0) as file:
        whole = file.tell() == 0 or (file.seek(-1, os.SEEK_END) and file.read(1) == b"\n")
        file.write((b"" if whole else b"\n") + json.dumps(entry._asdict()).encode() + b"\n")
        os.fsync(file.fileno())


def read_pages(folder: Path, index: dict[str, int], drawn_from: str) -> list[Page]:
    """All pages that were handed out, oldest first.

    Args:
        folder (Path): Of the curation.
        index (dict[str, int]): An image's number by its SHA-256; others have gone since.
        drawn_from (str): Hash of all images that there are; random images of other pages count as shown in order.
    """
    path = folder / PAGES_FILE
    pages: list[Page] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError):  # half a line, from a kill: nobody has seen that page
            continue
        queue, audit = ([index[name] for name in part if name in index] for part in (entry.queue, entry.audit))
        drawn = audit if entry.drawn_from == drawn_from else []
        pages.append(Page(len(pages), entry.client, _mixed(queue, audit), drawn, entry.kind))
    return pages


def _mixed(queue: list[int], audit: list[int]) -> list[int]:
    """Random images spread evenly among the others, so that their place tells nothing."""
    mixed = list(queue)
    for k, index in enumerate(audit):
        mixed.insert(round((k + 1) * (len(queue) + 1) / (len(audit) + 1)) + k, index)
    return mixed
