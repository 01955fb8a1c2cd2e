"""What every rejection rule gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Scales:
    """Scores of ``N`` images in spreads of the kept ones, and what else a rule may look at.

    Attributes:
        scores (np.ndarray): ``[N]``, finite; higher is more anomalous.
        likeness (np.ndarray | None): ``[N]``, how much an image is like *other* suspicious ones; NaN where its variant
            can't be compared, ``None`` where images are too few to tell.
        kept (np.ndarray | None): ``[N]`` mask of the images that scores and likeness are measured against; ``None`` if
            all are.
        distance (np.ndarray | None): ``[N]``, the scores without the likelihood, which rule ``auto`` rejects by. Under
            a density of the majority every image of a minority is unlikely, but it lies near the others of its kind.
        comparable (bool): Whether the images share enough for their scores to mean anything, see `Structure`.
    """

    scores: np.ndarray
    likeness: np.ndarray | None = None
    kept: np.ndarray | None = None
    comparable: bool = True
    distance: np.ndarray | None = None
