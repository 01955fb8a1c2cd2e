"""What the report shows beside the numbers: anomaly maps, the nearest kept image, look-alikes among the suspicious."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from anomalib_metarefine.curation.run_folder import read_run
from anomalib_metarefine.curation.schema import require_inside
from anomalib_metarefine.refinement.patches import LEAST_REPAIRED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_metarefine.refinement.engine import Result
    from anomalib_metarefine.refinement.fitting import Images

_COARSE = 4  # rows and columns of the pooled embedding that images are compared by
_FEWEST_GROUPED = 6  # images: fewer are seen at a glance
_MOST_GROUPS = 6
_PEAK = 3  # patches under the map's peak
_CHUNK = 64  # images at a time


@dataclass
class Evidence:
    """Evidence about the images that are not simply kept, and about what is unusual in those that are."""

    paths: list[str]  # image_path of the K images
    maps: np.ndarray  # [K x H x W] half precision, bits per dimension, one value a patch
    nearest: list[str]  # image_path of the kept image that looks most like each; empty if there is none
    groups: list[int]  # which look alike under the peak of their map; -1 where there are too few to tell
    limits: tuple[float, float]  # colour limits for all maps: a usual patch, and the most unusual ones
    # image_path of the U images with regions that repair would replace
    unusual_in: list[str] = field(default_factory=list)
    # [U x H x W] mask of the patches of these regions
    unusual: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=bool))
    images: list[str] = field(default_factory=list)  # image_path of all N images with features
    # [N x D] half precision, what is unusual about each image (`likeness.deviations`); a review learns from it which
    # images look alike there
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float16))

    def save(self, path: Path) -> None:
        """Write a NumPy archive."""
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                paths=np.array(self.paths, dtype=str),
                maps=self.maps,
                nearest=np.array(self.nearest, dtype=str),
                groups=np.array(self.groups, dtype=int),
                limits=np.array(self.limits, dtype=float),
                unusual_in=np.array(self.unusual_in, dtype=str),
                unusual=self.unusual,
                images=np.array(self.images, dtype=str),
                features=self.features,
            )

    @classmethod
    def load(cls, path: str | Path) -> Evidence:
        """Read what `save` wrote, as part of a run.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it is damaged, or not of the run that ``run.json`` beside it tells of.
        """
        file = Path(path)
        read_run(file)
        try:
            with np.load(file, allow_pickle=False) as data:
                found = {name: data[name] for name in (entry.name for entry in fields(cls))}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            msg = f"{file} is damaged ({error}). Run `metarefine curate` again."
            raise ValueError(msg) from error
        listed = {
            name: found[name].tolist() for name in ("paths", "nearest", "groups", "limits", "unusual_in", "images")
        }
        evidence = cls(**{**found, **listed, "limits": tuple(listed["limits"])})
        evidence._check(file)
        return evidence

    def _check(self, file: Path) -> None:
        require_inside([*self.paths, *filter(None, self.nearest), *self.unusual_in, *self.images], f"Names in {file}")
        shown = {len(self.paths), len(self.maps), len(self.nearest), len(self.groups)}
        if (
            len(shown) > 1
            or len(self.unusual_in) != len(self.unusual)
            or len(self.images) != len(self.features)
            or {self.maps.ndim, self.unusual.ndim} != {3}
        ):
            msg = f"{file} is damaged: its parts are not of the same number of images. Run `metarefine curate` again."
            raise ValueError(msg)


def gather_evidence(result: Result, names: Sequence[str], shown: np.ndarray) -> Evidence:
    """Maps, nearest kept images and groups, from the features of a fitted density.

    Args:
        result (Result): Of the engine.
        names (Sequence[str]): ``image_path`` of the ``N`` images, by row of the store.
        shown (np.ndarray): Indices of the ``K`` images to show, worst first.

    Returns:
        Evidence: Bounded by ``K``.
    """
    maps, grid = result.maps, result.images.grid
    limits = (float(maps.median()), float(np.quantile(maps.numpy(), 0.999)))
    patches = ~result.images.on_grid(result.images.outside_regions(result.usual, LEAST_REPAIRED), True)
    spoilt = np.flatnonzero(patches.any((1, 2)))
    unusual = result.scales.deviations
    if unusual.shape[1] == 0:  # images were not compared
        unusual = _under_peaks(result.images, maps, np.arange(len(names)))
    rest = ([names[i] for i in spoilt], patches[spoilt], list(names), unusual.astype(np.float16))
    if len(shown) == 0:
        return Evidence([], np.empty((0, *grid), np.float16), [], [], limits, *rest)
    return Evidence(
        [names[i] for i in shown],
        result.images.on_grid(maps[torch.from_numpy(shown)].half().numpy(), float(maps.min())),
        _nearest(result, names, shown),
        _group(_under_peaks(result.images, maps, shown)),
        limits,
        *rest,
    )


def _under_peaks(images: Images, maps: torch.Tensor, shown: np.ndarray) -> np.ndarray:
    """Mean whitened embedding of the highest patches, ``[K x D]``."""
    highest = maps.topk(min(_PEAK, maps.shape[1]), dim=1).indices
    parts = [
        chunk.gather(1, highest[rows].unsqueeze(2).expand(-1, -1, chunk.shape[2])).mean(1)
        for rows, chunk in images.chunks(shown)
    ]
    return torch.cat(parts).numpy()


def _nearest(result: Result, names: Sequence[str], shown: np.ndarray) -> list[str]:
    candidates = np.flatnonzero(result.kept)
    looks = _looks(result.images, shown)
    best = torch.full((len(shown),), float("inf"))
    found = np.full(len(shown), -1)
    for start in range(0, len(candidates), _CHUNK):
        part = candidates[start : start + _CHUNK]
        distance = torch.cdist(looks, _looks(result.images, part))
        distance[torch.from_numpy(shown[:, None] == part[None])] = float("inf")
        values, columns = distance.min(1)
        nearer = (values < best).numpy()
        found[nearer] = part[columns.numpy()[nearer]]
        best = torch.minimum(best, values)
    return [names[i] if i >= 0 else "" for i in found]


def _looks(images: Images, rows: np.ndarray) -> torch.Tensor:
    """Pooled whitened embeddings, ``[n x D * 16]``."""
    parts = []
    for _, chunk in images.chunks(rows):
        maps = torch.from_numpy(images.on_grid(chunk.transpose(1, 2).flatten(0, 1).numpy(), 0.0))
        parts.append(F.adaptive_avg_pool2d(maps.unflatten(0, (len(chunk), -1)), _COARSE).flatten(1))
    return torch.cat(parts)


def _group(features: np.ndarray) -> list[int]:
    """Clusters by direction, as many as the silhouette likes best; numbered by size."""
    if len(features) < _FEWEST_GROUPED:
        return [-1] * len(features)
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    norms = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.maximum(norms, 1e-12)
    if np.unique(directions, axis=0).shape[0] < 3:
        return [0] * len(features)
    trials = [
        AgglomerativeClustering(count, linkage="average", metric="cosine").fit_predict(directions + 1e-12)
        for count in range(2, min(_MOST_GROUPS, len(features) - 1) + 1)
    ]
    labels = max(trials, key=lambda trial: silhouette_score(directions, trial, metric="cosine"))
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order)[labels].tolist()
