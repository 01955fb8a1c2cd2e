"""What stands in the lines of the results, beside scores and decisions."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from anomalib_metarefine.deploy.arrivals import Arrival

if TYPE_CHECKING:
    from anomalib_metarefine.deploy.pipeline import Job


def now() -> str:
    """The time as ISO 8601, in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line_id(*facts: object) -> str:
    """What a receiver knows a line by.

    It follows from what the line is about. So one that a power failure took along, and that is written again, has the
    id under which a receiver may have seen it already.
    """
    return hashlib.sha256(repr(facts).encode("utf-8", "replace")).hexdigest()[:32]


def about_image(job: Job, model: str) -> dict[str, Any]:
    """What names an image, and the id of its line; ``model`` is the detector's fingerprint."""
    about = {**job.arrival._asdict(), "sha256": job.sha256}
    return {**about, "id": line_id(model, about)}


def about_event(event: dict[str, Any], model: str) -> dict[str, Any]:
    """An event of the monitor, the id of its line, and the time."""
    return {**event, "id": line_id(model, event), "time": now()}


def images_of(record: dict[str, Any]) -> list[Arrival]:
    """The images that a line says are done."""
    if record.get("event") == "earlier":
        return [Arrival(*entry) for entry in record["images"]]
    return [Arrival(record["path"], record["size"], record["mtime_ns"])] if "path" in record else []
