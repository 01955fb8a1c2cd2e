"""The refinement loop: score, reject, adapt again from the same initialisation, until the kept set stays the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MIN_KEPT = 0.5  # past this share of rejected images "normal" would no longer mean the majority


@dataclass
class Round:
    """One round of refinement.

    Attributes:
        fence (float): Score past which images were rejected; infinity where none was.
        scores (list[float]): Score of every image under the density fitted on the images kept before this round.
        rejected (int): Images outside the kept set after this round.
    """

    fence: float
    scores: list[float]
    rejected: int


@dataclass
class Refinement:
    """What refinement decided, image by image and round by round.

    Attributes:
        paths (list[str]): The training images.
        kept (list[bool]): Whether the final density was fitted on the image.
        scores (list[float]): Final scores, in robust standard deviations of the kept images.
        rounds (list[Round]): One entry a round.
        stop_reason (str): ``"converged"``, ``"cycle"``, ``"rounds"`` or ``"off"``.
        left_out (dict[str, str]): Images that were never scored, with the reason.
        parts (dict[str, list[float]]): What the final scores are made of.
        unusual_patches (float): Share of the patches of the kept images that the final density was not fitted on.
    """

    paths: list[str]
    kept: list[bool]
    scores: list[float]
    rounds: list[Round] = field(default_factory=list)
    stop_reason: str = "off"
    left_out: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)
    unusual_patches: float = 0.0

    @property
    def rejected(self) -> list[str]:
        """Paths of the rejected images, worst first."""
        order = np.argsort(self.scores)[::-1]
        return [self.paths[i] for i in order if not self.kept[i]]

    def table(self) -> pd.DataFrame:
        """One row per image: ``image_path``, ``score``, ``decision``, and a ``score_round_<k>`` for each round."""
        rounds = {f"score_round_{i + 1}": r.scores for i, r in enumerate(self.rounds)}
        decision = np.where(self.kept, "keep", "reject")
        return pd.DataFrame({"image_path": self.paths, "score": self.scores, "decision": decision, **rounds})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for a checkpoint that loads with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Refinement:
        """The inverse of `to_dict`."""
        return cls(**{**data, "rounds": [Round(**r) for r in data["rounds"]]})


def refine(
    score: Callable[[np.ndarray], np.ndarray],
    paths: list[str],
    fence: Callable[[np.ndarray], float],
    max_rounds: int,
    on_round: Callable[[int, Round], None] | None = None,
    known: Mapping[int, bool] | None = None,
) -> Refinement:
    """Reject images round after round.

    Every round fits on the images kept so far, scores *all* images, and decides on all of them anew: an image that was
    rejected too early comes back. At least half of the images are always kept.

    Args:
        score (Callable[[np.ndarray], np.ndarray]): Fits on the images of a mask ``[N]``, scores all, ``[N]``.
        paths (list[str]): Names of the ``N`` images.
        fence (Callable[[np.ndarray], float]): The score past which an image is rejected, see `Rule.fence`. It is asked
            about the scores of every round right after they were made.
        max_rounds (int): Rounds at most; 0 scores the images and rejects none.
        on_round (Callable[[int, Round], None] | None): Called after each round, with its number from 1.
        known (Mapping[int, bool] | None): Images that a person has decided to keep (true) or to reject: neither fence
            nor the limit of one half moves them.

    Returns:
        Refinement: Decisions, scores and the history. The last call of ``score`` was with the final kept set.
    """
    count = len(paths)
    kept = _with_known(np.ones(count, dtype=bool), known)
    scores = score(kept)
    seen = {kept.tobytes()}
    rounds: list[Round] = []
    stop_reason = "off" if max_rounds == 0 else "rounds"
    for number in range(1, max_rounds + 1):
        limit = fence(scores)
        candidate = scores <= limit
        fewest = max(1, int(np.ceil(_MIN_KEPT * count)))
        if candidate.sum() < fewest:
            limit = float(np.sort(scores)[fewest - 1])
            candidate = np.zeros(count, dtype=bool)
            candidate[np.argsort(scores, kind="stable")[:fewest]] = True
        candidate = _with_known(candidate, known)
        rounds.append(Round(limit, scores.tolist(), int(count - candidate.sum())))
        if on_round:
            on_round(number, rounds[-1])
        if np.array_equal(candidate, kept):
            stop_reason = "converged"
            break
        kept = candidate
        scores = score(kept)
        if kept.tobytes() in seen:
            stop_reason = "cycle"
            break
        seen.add(kept.tobytes())
    return Refinement(list(paths), kept.tolist(), scores.tolist(), rounds, stop_reason)


def _with_known(kept: np.ndarray, known: Mapping[int, bool] | None) -> np.ndarray:
    for image, keep in (known or {}).items():
        kept[image] = keep
    return kept if kept.any() else ~kept
