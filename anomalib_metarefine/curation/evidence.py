"""What the report shows beside the numbers: anomaly maps, the nearest kept image, look-alikes among the suspicious."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from anomalib_metarefine.curation.run_folder import read_run
from anomalib_metarefine.curation.schema import require_inside
from anomalib_metarefine.images.storage import located
from anomalib_metarefine.refinement.fitting import whitened
from anomalib_metarefine.refinement.learned import crowded_places
from anomalib_metarefine.refinement.patches import LEAST_REPAIRED, scale_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anomalib_metarefine.features.embedding import Whitening
    from anomalib_metarefine.features.shards import Shard
    from anomalib_metarefine.refinement.engine import Result
    from anomalib_metarefine.refinement.patches import Places

_COARSE = 4  # rows and columns of the pooled embedding that images are compared by
_FEWEST_GROUPED = 6  # images: fewer are seen at a glance
_MOST_GROUPS = 6
_PEAK = 3  # patches under the map's peak


@dataclass
class Evidence:
    """Evidence about the images that are not simply kept, and about what is unusual in those that are."""

    paths: list[str]  # image_path of the K images
    maps: np.ndarray  # [K x H x W] half precision, one score a patch
    nearest: list[str]  # image_path of the kept image that looks most like each; empty if there is none
    groups: list[int]  # which look alike under the peak of their map; -1 where there are too few to tell
    limits: tuple[float, float]  # colour limits for all maps: a usual patch, and the most unusual ones
    # image_path of the U images with regions that repair would replace
    unusual_in: list[str] = field(default_factory=list)
    # [U x H x W] mask of the patches of these regions
    unusual: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=bool))
    images: list[str] = field(default_factory=list)  # image_path of all N images with features
    # [N x D] half precision, what is unusual about each image (`keep_deviations`); a review learns from it which
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
        file = located(path)
        read_run(file)
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as data:
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
    images = result.images
    store, places = images.store, images.places
    sample = store.read("maps", scale_rows(np.arange(len(names))))
    limits = (float(np.median(sample)), float(np.quantile(sample, 0.999)))
    everyone = np.ones(len(names), dtype=bool)
    narrow = crowded_places(store, "usual", places, LEAST_REPAIRED, everyone)
    found = store.map(_unusual, (places, narrow), np.arange(len(names)))
    spoilt, patches = (np.concatenate(part) for part in zip(*found, strict=True))
    # If images were not compared, it is what lies under the peaks of their maps.
    features = store.read("deviations") if result.axes else _under_peaks(result, everyone)
    rest = ([names[i] for i in spoilt], patches, list(names), features.astype(np.float16))
    if len(shown) == 0:
        return Evidence([], np.empty((0, *images.grid), np.float16), [], [], limits, *rest)
    maps = store.read("maps", shown).astype(np.float16)
    asked = np.zeros(len(names), dtype=bool)
    asked[shown] = True
    peaks = _under_peaks(result, asked)[np.searchsorted(np.flatnonzero(asked), shown)]
    return Evidence(
        [names[i] for i in shown],
        places.on_grid(maps, float(sample.min())),
        _nearest(result, names, shown),
        _group(peaks),
        limits,
        *rest,
    )


def _unusual(shard: Shard, shared: tuple[Places, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the images with unusual regions, and the patches of these ``[U x H x W]``."""
    places, narrow = shared
    patches = ~places.on_grid(places.outside_regions(shard.read("usual"), LEAST_REPAIRED, narrow), True)
    spoilt = patches.any((1, 2))
    return rows[spoilt], patches[spoilt]


def _under_peaks(result: Result, asked: np.ndarray) -> np.ndarray:
    """Mean whitened embedding of the highest patches of the images asked for (mask ``[N]``), ``[K x D]``."""
    store = result.images.store
    return np.concatenate(store.map(_peaks_of_shard, result.images.whitening, asked, only=asked))


@torch.no_grad()
def _peaks_of_shard(shard: Shard, whitening: Whitening, asked: np.ndarray) -> np.ndarray:
    maps, parts = torch.from_numpy(shard.read("maps")), []
    highest = maps.topk(min(_PEAK, maps.shape[1]), dim=1).indices
    for rows, chunk in whitened(shard, whitening, np.flatnonzero(asked)):
        parts.append(chunk.gather(1, highest[rows].unsqueeze(2).expand(-1, -1, chunk.shape[2])).mean(1))
    return torch.cat(parts).numpy()


def _nearest(result: Result, names: Sequence[str], shown: np.ndarray) -> list[str]:
    """For each image shown, the kept one that looks most like it; empty if there is none."""
    images = result.images
    looks = torch.cat([_looks(chunk, images.places) for _, chunk in images.chunks(shown)])
    shared = looks, shown, images.whitening, images.places
    found = images.store.map(_nearest_of_shard, shared, np.arange(len(names)), result.kept, only=result.kept)
    distances, rows = (np.stack(part) for part in zip(*found, strict=True))
    best, columns = distances.argmin(0), np.arange(len(shown))
    nearest = np.where(np.isfinite(distances[best, columns]), rows[best, columns], -1)
    return [names[i] if i >= 0 else "" for i in nearest]


@torch.no_grad()
def _nearest_of_shard(
    shard: Shard,
    shared: tuple[torch.Tensor, np.ndarray, Whitening, Places],
    number: np.ndarray,
    kept: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance and row of the nearest kept image of a shard, ``[K]`` each."""
    looks, shown, whitening, places = shared
    best, found = torch.full((len(shown),), float("inf")), np.full(len(shown), -1)
    for rows, chunk in whitened(shard, whitening, np.flatnonzero(kept)):
        part = number[rows]
        distance = torch.cdist(looks, _looks(chunk, places))
        distance[torch.from_numpy(shown[:, None] == part[None])] = float("inf")
        values, columns = distance.min(1)
        nearer = (values < best).numpy()
        found[nearer] = part[columns.numpy()[nearer]]
        best = torch.minimum(best, values)
    return best.numpy(), found


def _looks(chunk: torch.Tensor, places: Places) -> torch.Tensor:
    """Pooled whitened embeddings of patches ``[n x P x D]``, ``[n x D * 16]``."""
    maps = torch.from_numpy(places.on_grid(chunk.transpose(1, 2).flatten(0, 1).numpy(), 0.0))
    return F.adaptive_avg_pool2d(maps.unflatten(0, (len(chunk), -1)), _COARSE).flatten(1)


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
