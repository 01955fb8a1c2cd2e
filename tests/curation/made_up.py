"""Manifests and evidence over small made-up images."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from anomalib_metarefine.curation.evidence import Evidence
from anomalib_metarefine.curation.manifest import Manifest

ODD_NAMES = ["<b>bold & \"quoted\" 'name'.png", "größe 部品.png", "50% #1?.png", "a, b.png", "sub/ü/{{ 7 * 7 }}.png"]
FENCE = 4.0


def make(root: Path, keep=6, reject=4, review=3, names=(), files=True, groups=None, quality=None):
    """A manifest and its evidence over small images under ``root``; ``names`` are the first of the rejected."""
    listed = [f"good/{i:05d}.png" for i in range(keep)]
    listed += [*names, *(f"bad/{i:05d}.png" for i in range(reject - len(names)))]
    listed += [f"near/{i:05d}.png" for i in range(review)]
    rng = np.random.default_rng(0)
    if files:
        for name in listed:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (24, 32), dtype=np.uint8)).save(root / name)
    decision = np.repeat(["keep", "reject", "review"], [keep, reject, review])
    score = np.where(decision == "keep", rng.normal(0, 1, len(listed)).clip(-3, 3), FENCE - 0.3)
    score[decision == "reject"] = FENCE + 1 + np.arange(reject)[::-1]
    table = pd.DataFrame(
        {
            "image_path": listed,
            "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in listed],
            "decision": decision,
            "decided_by": "rule",
            "round": (decision == "reject").astype(int),
            "reason": np.where(decision == "reject", "A patch stands out <far>.", "Close to the others."),
            "score": score,
            "fence_distance": score - FENCE,
            "q_value": 1 / (1 + np.exp((score - FENCE).clip(-50, 50))),
            "variant": 0,
            "score_round_1": score * 0.9,
            "quality": "",
        }
    )
    for name, finding in (quality or {}).items():
        table.loc[table.image_path == name, "quality"] = finding
    run = {
        "created": "2026-03-01T09:12:44Z",
        "root": str(root),
        "source": "line <7>",
        "versions": {"anomalib": "2.7.0"},
        "seed": 3,
        "settings": {"rule": "auto"},
        "data": {"images": len(listed), "sha256": "f00d"},
        "structure": {"text": "Photographs of one kind of part."},
        "rounds": [{"number": 1, "fence": FENCE * 0.9, "rejected": reject}],
        "stop_reason": "converged",
        "seconds": {"features": 1.5},
    }
    shown = listed[keep:]
    evidence = Evidence(
        paths=shown,
        maps=rng.random((len(shown), 6, 8)).astype(np.float16),
        nearest=[listed[0] if keep else ""] * len(shown),
        groups=groups or [-1] * len(shown),
        limits=(0.0, 1.0),
        images=listed,
        features=rng.normal(size=(len(listed), 16)).astype(np.float16),
    )
    return Manifest(table, run), evidence


def unusual_in(evidence: Evidence, *names: str) -> Evidence:
    """One unusual patch, the same in each of these images."""
    masks = np.zeros((len(names), 6, 8), dtype=bool)
    masks[:, 2, 3] = True
    return dataclasses.replace(evidence, unusual_in=list(names), unusual=masks)
