"""Results of a line as a manifest, so that the review page opens them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.robust import lower_side_scale

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_DECISION = {"normal": "keep", "uncertain": "review", "anomalous": "reject"}


def manifest_of(lines: Iterable[Mapping[str, Any]]) -> Manifest:
    """A manifest of the images that a line has decided on: normal ones are kept, anomalous ones rejected.

    Args:
        lines (Iterable[Mapping[str, Any]]): Of `metarefine watch`. Of several about one file the last one counts.

    Raises:
        ValueError: If the line has decided on no image.
    """
    last = {os.path.realpath(line["path"]): line for line in lines if line.get("raw_score") is not None}
    if not last:
        msg = "The line has not decided on any image yet, so there is nothing to review."
        raise ValueError(msg)
    root = Path(os.path.commonpath([Path(path).parent for path in last]))
    raw, limit = (np.array([line[name] for line in last.values()]) for name in ("raw_score", "threshold"))
    centre, spread = lower_side_scale(raw)
    spread = spread or 1.0
    table = pd.DataFrame(
        {
            "image_path": [Path(path).relative_to(root).as_posix() for path in last],
            "sha256": [line["sha256"] or "" for line in last.values()],
            "decision": [_DECISION[line["decision"]] for line in last.values()],
            "decided_by": "rule",
            "round": [int(line["decision"] == "anomalous") for line in last.values()],
            "reason": [f"score {line['raw_score']:.4g}, threshold {line['threshold']:.4g}" for line in last.values()],
            "score": (raw - centre) / spread,
            "fence_distance": (raw - limit) / spread,
            "q_value": np.nan,
            "variant": 0,
            "quality": "",
        }
    )
    return Manifest(table, {"root": str(root)})
