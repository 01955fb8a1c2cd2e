"""Patch-level rejection: an image with a small defect has many good patches, and no whole image need stand apart.

Where dirty images score like clean ones (KolektorSDD, say) no fence between *images* finds any. Their defective
patches still lie further from their like than other patches of the same place do, and can be left out of what is
learned, place by place: in connected regions, since a single odd patch is mostly noise, together with what lies around
a region, since features see further than their patch. That is only right where a place shows much the same in every
image: with parts that lie anywhere, the rare patches of a place are the part itself. `keeps_order` tells the two apart.

References:
    Jiang et al., "SoftPatch: Unsupervised Anomaly Detection with Noisy Data", arXiv 2403.14233 (leaving out patches
    instead of images, place by place).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.stats import spearmanr

_ONE_SIGMA = 0.1587  # of a normal distribution lies this far below the mean or further
_LEAST_SPREAD = 0.05  # of log distances: places that look the same in all images have no spread at all
# Below, what is left of a place is too little to learn it from: ELPV mono loses 9 points with 32 images, 1 with 64.
_FEWEST_FOR_REGIONS = 80
_LEAST_CORRELATION = 0.9
_SCALED = 8192  # images
LEAST_REGION = 3  # patches, before it is widened
LEAST_REPAIRED = 5  # stricter: to learn a place from fewer images costs less than to learn it from altered ones
_NEIGHBOURS = np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))], dtype=bool)  # diagonal ones too


class Places(NamedTuple):
    """The places of patches: a grid, and which of it images have."""

    grid: tuple[int, int]  # rows and columns
    looked: np.ndarray | None  # [rows * columns] mask of the places that are not ignored; None means all

    def on_grid(self, values: np.ndarray, ignored: float | bool) -> np.ndarray:
        """Values of patches ``[n x P]`` as maps ``[n x rows x columns]``, with a value for places that are ignored."""
        if self.looked is None:
            return values.reshape(-1, *self.grid)
        maps = np.full((len(values), len(self.looked)), ignored, dtype=values.dtype)
        maps[:, self.looked] = values
        return maps.reshape(-1, *self.grid)

    def outside_regions(self, usual: np.ndarray, least: int, narrow: np.ndarray | None = None) -> np.ndarray:
        """Patches outside of the connected regions of unusual ones, each region one patch wider than it is.

        What is ignored is no part of a region.

        Args:
            usual (np.ndarray): ``[N x P]`` mask, from `is_usual`.
            least (int): Patches of a region, before it is widened; what is smaller is none.
            narrow (np.ndarray | None): ``[rows x columns]`` mask of the places where regions are not widened, see
                `crowded`; ``None`` takes those of these images.

        Returns:
            np.ndarray: ``[N x P]`` mask.

        Example:
            >>> usual = np.ones((3, 4, 6), dtype=bool)
            >>> usual[0, 0, :5] = usual[0, 3, 0] = False
            >>> outside = Places((4, 6), None).outside_regions(usual.reshape(3, 24), least=5)
            >>> outside[0].reshape(4, 6).astype(int)
            array([[0, 0, 0, 0, 0, 0],
                   [0, 0, 0, 0, 0, 0],
                   [1, 1, 1, 1, 1, 1],
                   [1, 1, 1, 1, 1, 1]])
        """
        found, wide = regions(self.on_grid(usual, True), least)
        narrow = crowded(wide.sum(0), len(wide)) if narrow is None else narrow
        wide[:, narrow] = found[:, narrow]
        outside = ~wide.reshape(len(usual), -1)
        return outside if self.looked is None else outside[:, self.looked]


def usual_limit(distances: np.ndarray, fence: float) -> np.ndarray:
    """Logarithm of the distance past which a patch is further from its like than other patches of the same place.

    Half of the patches of a place always lie below, see `place_scale`.

    Args:
        distances (np.ndarray): ``[N x P]`` distance of each patch to the nearest like it, from 0 up.
        fence (float): Spreads above the median from which on a patch is unusual.

    Returns:
        np.ndarray: ``[P]``; infinite where there are fewer than 80 images.

    Example:
        >>> distances = np.linspace(1.0, 1.5, 81)[:, None].repeat(2, axis=1)
        >>> distances[0, 1] = 9.0
        >>> (~is_usual(distances, usual_limit(distances, fence=2.5))).nonzero()
        (array([0]), array([1]))
    """
    if len(distances) < _FEWEST_FOR_REGIONS:
        return np.full(distances.shape[1], np.inf)
    median, spread = place_scale(_logs(distances))
    return median + fence * spread


def is_usual(distances: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Mask ``[N x P]`` of the patches up to a limit, see `usual_limit`."""
    return _logs(distances) <= limit


def _logs(distances: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(distances, np.finfo(np.float32).tiny))


def place_scale(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and spread of the logarithms of distances ``[N x P]`` at every place, ``[P]`` each.

    The spread is read off the side that anomalies cannot touch, below the median.
    """
    low, median = np.quantile(logs, [_ONE_SIGMA, 0.5], axis=0)
    return median, np.maximum(median - low, _LEAST_SPREAD)


def scale_rows(rows: np.ndarray) -> np.ndarray:
    """Of many images, those that `place_scale` is read off: 8,192 say it to a hundredth of a spread."""
    if len(rows) <= _SCALED:
        return rows
    return rows[np.linspace(0, len(rows) - 1, _SCALED).round().astype(int)]


def regions(usual: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Connected regions of unusual patches of at least a size, and the same one patch wider.

    Args:
        usual (np.ndarray): ``[N x rows x columns]`` mask.
        least (int): Patches of a region; what is smaller is none.

    Returns:
        tuple[np.ndarray, np.ndarray]: Masks of the same shape.
    """
    labels, _ = ndimage.label(~usual, _NEIGHBOURS)
    sizes = np.bincount(labels.ravel(), minlength=1)
    sizes[0] = 0
    found = (sizes >= least)[labels]
    return found, ndimage.binary_dilation(found, _NEIGHBOURS)


def crowded(wide: np.ndarray, images: int) -> np.ndarray:
    """Mask of the places where less than half of the images would be left, from how many lose them."""
    return wide > images / 2


def keeps_order(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether learning without the unusual patches leaves images in about the order they had.

    Leaving out defects moves the images that have them. Leaving out what is normal, but rare at every single place,
    moves all: their rank correlation is below 0.7 on `screw`, and above 0.97 on ELPV and KolektorSDD.

    Args:
        before (np.ndarray): Scores ``[N]`` under a density of all patches.
        after (np.ndarray): Scores ``[N]`` of the same images under a density of the usual patches.

    Returns:
        bool: Whether Spearman's rank correlation is at least 0.9; false where there is none, as all scores are alike.
    """
    if np.ptp(before) == 0 or np.ptp(after) == 0:
        return False
    return bool(spearmanr(before, after).statistic >= _LEAST_CORRELATION)
