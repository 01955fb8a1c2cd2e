"""The rounds of refinement: score, reject, fit again, until the kept set stays the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pandas as pd

from anomalib_metarefine.refinement.scales import Scales
from anomalib_metarefine.rule_settings import MOST_REJECTED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anomalib_metarefine.refinement.rules import Rule

Found = TypeVar("Found", bound=Scales)


@dataclass(frozen=True)
class Round:
    """One round of refinement.

    Attributes:
        fence (float): Score that the rejected images lie past; infinity where none was rejected.
        scores (list[float]): Score of every image under the density fitted on the images kept before this round.
        rejected (int): Images outside the kept set after this round.
    """

    fence: float
    scores: list[float]
    rejected: int


@dataclass(frozen=True)
class Rounds(Generic[Found]):
    """What came of the rounds.

    Attributes:
        kept (np.ndarray): ``[N]`` mask; the last call of ``score`` was with it.
        scales (Scales): What that call gave.
        rounds (tuple[Round, ...]): One entry a round.
        stop_reason (str): ``"converged"``, ``"cycle"``, ``"rounds"`` or ``"off"``.
    """

    kept: np.ndarray
    scales: Found
    rounds: tuple[Round, ...]
    stop_reason: str


@dataclass(frozen=True)
class Refinement:
    """What refinement decided, image by image and round by round; kept in the checkpoint.

    Attributes:
        paths (list[str]): The training images.
        kept (list[bool]): Whether the final density was fitted on the image.
        scores (list[float]): Final scores, in robust standard deviations of the kept images.
        rounds (list[Round]): One entry a round.
        stop_reason (str): See `Rounds`.
        structure (str): What kind of folder it is, in a sentence; see `Structure`.
        left_out (dict[str, str]): Images that were never scored, with the reason.
        unusual_patches (float): Share of the patches of the kept images that the final density was not fitted on.
    """

    paths: list[str]
    kept: list[bool]
    scores: list[float]
    rounds: list[Round] = field(default_factory=list)
    stop_reason: str = "off"
    structure: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
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
    def from_dict(cls, data: Mapping[str, Any]) -> Refinement:
        """The inverse of `to_dict`."""
        return cls(**{**data, "rounds": [Round(**r) for r in data["rounds"]]})


def run_rounds(
    score: Callable[[np.ndarray], Found],
    count: int,
    rule: Rule,
    most: int,
    answers: Mapping[int, bool] | None = None,
    on_round: Callable[[int, Round], None] = lambda _number, _round: None,
) -> Rounds[Found]:
    """Reject images round after round.

    Every round fits on the images kept so far, scores *all* images, and decides on all of them anew: an image that was
    rejected too early comes back. At least half of the images are always kept.

    Args:
        score (Callable[[np.ndarray], Scales]): Fits on the images of a mask ``[N]``, scores all.
        count (int): The number ``N`` of images.
        rule (Rule): Says which images to reject.
        most (int): Rounds at most; 0 scores the images and rejects none.
        answers (Mapping[int, bool] | None): Images that a person has decided to keep (true) or to reject: neither rule
            nor the limit of one half moves them.
        on_round (Callable[[int, Round], None]): Called after each round, with its number from 1.

    Returns:
        Rounds: Decisions and history.

    Raises:
        ValueError: If a person rejected every image.
    """
    kept = _answered(np.ones(count, dtype=bool), answers)
    scales = score(kept)
    seen, rounds = {kept.tobytes()}, []
    for number in range(1, most + 1):
        images, fence = rule.reject(scales)
        candidate = _answered(_at_least_half(~images, scales.scores), answers)
        rounds.append(Round(fence, scales.scores.tolist(), int(count - candidate.sum())))
        on_round(number, rounds[-1])
        if np.array_equal(candidate, kept):
            return Rounds(kept, scales, tuple(rounds), "converged")
        kept = candidate
        scales = score(kept)
        if kept.tobytes() in seen:
            return Rounds(kept, scales, tuple(rounds), "cycle")
        seen.add(kept.tobytes())
    return Rounds(kept, scales, tuple(rounds), "rounds" if most else "off")


def _at_least_half(kept: np.ndarray, scores: np.ndarray) -> np.ndarray:
    fewest = max(1, int(np.ceil((1 - MOST_REJECTED) * len(kept))))
    if kept.sum() >= fewest:
        return kept
    lowest = np.zeros(len(kept), dtype=bool)
    lowest[np.argsort(scores, kind="stable")[:fewest]] = True
    return lowest


def _answered(kept: np.ndarray, answers: Mapping[int, bool] | None) -> np.ndarray:
    """A mask with a person's answers in it. If it then keeps nothing, what nobody decided on is kept."""
    answers = answers or {}
    rejected = [image for image, keep in answers.items() if not keep]
    if len(rejected) == len(kept):
        msg = f"{len(rejected)} of {len(kept)} images were rejected by a person. Expected at least one to keep."
        raise ValueError(msg)
    for image, keep in answers.items():
        kept[image] = keep
    if not kept.any():
        kept[:] = True
        kept[rejected] = False
    return kept


def record(
    rounds: Rounds[Found], paths: Sequence[str], structure: str, left_out: Mapping[str, str], unusual_patches: float
) -> Refinement:
    """The rounds as they are kept in a checkpoint; arguments as in `Refinement`."""
    return Refinement(
        list(paths), rounds.kept.tolist(), rounds.scales.scores.tolist(), list(rounds.rounds), rounds.stop_reason,
        structure, dict(left_out), unusual_patches,
    )  # fmt: skip
