"""Copies of an image among look-alikes.

Perceptual hashes were made for pictures of all kinds: aligned parts under one light hash alike. Here an image counts as
a copy only if another one explains its thumbnail far better than the folder's other images do, after brightness,
contrast and a small shift are fitted.

References:
    Lucas and Kanade, "An Iterative Image Registration Technique with an Application to Stereo Vision", 1981 (the shift
    as a linear term in the image's gradients).
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

THUMBNAIL = 64  # pixels on each side
_CROP = 2  # pixels at the border of a thumbnail, where a shift brings in what the other image doesn't show
_COARSE = 16  # pixels on each side, for the search of candidates
_CANDIDATES = 5  # nearest images looked at
_LEAST_LIKENESS = 0.5  # correlation of a candidate; copies shifted by a pixel or two stay above 0.8
_LARGE = 2**22  # pixels
_OTHERS = 9  # images that say what look-alikes of the folder have in common
_BLOCK = 1024  # images compared with all at a time: 40 MB of correlations at 10,000 images
_ENOUGH_FOR_CROWDING = 20  # images
# Residuals in grey levels of 255. Copies leave at most 0.003 of the residual energy between look-alikes and 0.6 grey
# levels; different screws at the same angle 0.004, but 1.9 grey levels.
_SHARE = 0.005
_LARGEST_RMS = 1.0
_ENCODING_RMS = 0.15  # what JPEG at quality 80 leaves in a thumbnail


def thumbnail(grey: np.ndarray) -> np.ndarray:
    """A descriptor of the image as a whole, smooth enough for a shift to be linear in its gradients.

    Args:
        grey (np.ndarray): ``[H x W]``, uint8 or uint16.

    Returns:
        np.ndarray: ``[64 x 64]`` float32, in the image's own units.
    """
    if grey.size > _LARGE:  # a first step in integers; their rounding averages out in the second
        grey = cv2.resize(grey, (8 * THUMBNAIL, 8 * THUMBNAIL), interpolation=cv2.INTER_AREA)
    small = cv2.resize(grey.astype(np.float32), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(small, (0, 0), 1.0)


def first_of_exact_copies(digests: list[str]) -> np.ndarray:
    """Position of the first image with the same digest.

    Args:
        digests (list[str]): One per image.

    Returns:
        np.ndarray: ``[N]`` positions; its own where an image is the first.
    """
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(digest, position) for position, digest in enumerate(digests)], dtype=int)


def first_of_near_copies(thumbnails: np.ndarray) -> np.ndarray:
    """Position of the first image of each image's group of near duplicates.

    With fewer than three images nothing tells a copy from a look-alike, and none is found.

    Args:
        thumbnails (np.ndarray): ``[N x 64 x 64]`` in grey levels of 255, no two from the same file content.

    Returns:
        np.ndarray: ``[N]`` positions; its own where an image is the first or has no near duplicate.
    """
    count = len(thumbnails)
    if count < 3:
        return np.arange(count)
    rng = np.random.default_rng(0)
    candidates, likeness = _nearest(thumbnails)
    usual: dict[tuple[int, int], float] = {}

    def usual_energy(image: int, but: int) -> float:
        """Median residual energy of an image explained by some others; computed once per image."""
        # In a small folder the excluded image may be one of those drawn, so it counts for the answer.
        key = (image, but if count <= 4 * _OTHERS else -1)
        if key not in usual:
            others = np.setdiff1d(np.arange(count), [image, but])
            others = rng.choice(others, min(_OTHERS, len(others)), replace=False)
            usual[key] = float(np.median([residual_energy(thumbnails[o], thumbnails[image]) for o in others]))
        return usual[key]

    crowding = 1.0
    if count >= _ENOUGH_FOR_CROWDING:
        # In a crowd, everyone has close neighbours that are no copies: what the fifth nearest explains sets the scale.
        sample = rng.choice(count, min(200, count), replace=False)
        fifth = [
            max(residual_energy(thumbnails[c], thumbnails[i]) for c in candidates[i])
            / max(usual_energy(i, candidates[i, 0]), 1e-9)
            for i in sample
        ]
        crowding = min(1.0, float(np.median(fifth)))

    alike = np.argwhere(likeness > _LEAST_LIKENESS)
    pairs = {tuple(sorted((int(i), int(candidates[i, k])))) for i, k in alike}
    copies = []
    for first, second in sorted(pairs):
        for source, target in ((first, second), (second, first)):
            energy = residual_energy(thumbnails[source], thumbnails[target])
            if energy > _LARGEST_RMS**2:
                continue
            typical = usual_energy(target, source)
            if energy < min(_SHARE * typical + _ENCODING_RMS**2, 0.1 * crowding * typical):
                copies.append((first, second))
                break
    links = np.array(copies, dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(count, count))
    group = connected_components(graph, directed=False)[1]
    _, first_of_group = np.unique(group, return_index=True)
    return first_of_group[group]


def residual_energy(source: np.ndarray, target: np.ndarray) -> float:
    """Mean square of what is left of ``target`` after ``source`` with a fitted gain, offset and small shift.

    Args:
        source (np.ndarray): ``[64 x 64]``.
        target (np.ndarray): ``[64 x 64]``.

    Returns:
        float: In squared units of ``target``.
    """
    inner = slice(_CROP, -_CROP)
    wide = source[_CROP - 1 : 1 - _CROP, _CROP - 1 : 1 - _CROP]
    down = wide[2:, 1:-1] - wide[:-2, 1:-1]
    right = wide[1:-1, 2:] - wide[1:-1, :-2]
    terms = np.stack([source[inner, inner].ravel(), down.ravel(), right.ravel()]).astype(np.float64)
    terms -= terms.mean(axis=1, keepdims=True)
    rest = target[inner, inner].ravel().astype(np.float64)
    rest -= rest.mean()
    weights = np.linalg.lstsq(terms @ terms.T, terms @ rest, rcond=None)[0]
    rest -= weights @ terms
    return float(rest @ rest / len(rest))


def _nearest(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images that correlate best, after what all have in common is taken away.

    Returns:
        tuple[np.ndarray, np.ndarray]: ``[N x K]`` positions and correlations, in no order within a row.
    """
    count, block = len(thumbnails), THUMBNAIL // _COARSE
    coarse = thumbnails.reshape(count, _COARSE, block, _COARSE, block).mean(axis=(2, 4)).reshape(count, -1)
    coarse -= coarse.mean(axis=1, keepdims=True)
    coarse /= coarse.std(axis=1, keepdims=True) + 1e-6
    if count > 2 * _CANDIDATES:  # with few images, the median is one of them
        coarse -= np.median(coarse, axis=0)
    coarse /= np.linalg.norm(coarse, axis=1, keepdims=True) + 1e-6
    keep = min(_CANDIDATES, count - 1)
    nearest, best = np.empty((count, keep), dtype=int), np.empty((count, keep), np.float32)
    for start in range(0, count, _BLOCK):
        likeness = coarse[start : start + _BLOCK] @ coarse.T
        rows = np.arange(len(likeness))
        likeness[rows, start + rows] = -np.inf
        columns = np.argpartition(-likeness, keep - 1, axis=1)[:, :keep]
        nearest[start : start + _BLOCK], best[start : start + _BLOCK] = columns, likeness[rows[:, None], columns]
    return nearest, best
