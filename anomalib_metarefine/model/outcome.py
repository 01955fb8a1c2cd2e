"""What an update did, in words and numbers, and whether a new training is due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MOST_DRIFT = 0.05  # bits per dimension, see docs/update.md
MOST_CHANGED = 0.5  # of the images of the training
MOST_FORGOTTEN = 0.3  # of them; when half were, twice as many decisions were others as when a tenth was


@dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        images (pd.DataFrame): One row per new image: ``image_path``, ``sha256``, ``score`` in spreads of the kept
            images, ``decision`` (keep or reject), ``decided_by`` (rule or user), and where variants have names
            ``variant`` and ``variant_by`` (user or likeness); highest score first.
        forgotten (dict[str, str]): SHA-256 of the images that the model no longer knows, by path.
        changed (dict[str, str]): New decision about old images, by path.
        skipped (dict[str, str]): Reason, by path, for images that were to be added and were not.
        kept (int): Images that the model has now learned from.
        threshold (tuple[float, float]): Raw image threshold before and after.
        recalibrated (bool): Whether thresholds were chosen anew; if not, they came from images that are not at hand.
        drift (float): See `Memory.drift`.
        share_changed (float): Images added and forgotten since the training, over those of the training.
        share_forgotten (float): Share of the images of the training that were forgotten. All others were compared with
            them (with a random part, where there were many), and that no update can do again.
    """

    images: pd.DataFrame
    forgotten: dict[str, str]
    changed: dict[str, str]
    skipped: dict[str, str]
    kept: int
    threshold: tuple[float, float]
    recalibrated: bool
    drift: float
    share_changed: float
    share_forgotten: float

    @property
    def training_due(self) -> str:
        """Why a new training is due; empty if none is."""
        if self.drift > MOST_DRIFT:
            return f"the features have drifted by {self.drift:.3f} bits per dimension (at most {MOST_DRIFT})"
        if self.share_changed > MOST_CHANGED:
            return f"{self.share_changed:.0%} of the images of the training were added or forgotten (at most 50 %)"
        if self.share_forgotten > MOST_FORGOTTEN:
            return f"{self.share_forgotten:.0%} of the images that all were compared with are forgotten (at most 30 %)"
        return ""

    def lines(self) -> list[str]:
        """For people."""
        counts = self.images.decision.value_counts()
        found = [
            f"Added {counts.get('keep', 0)} images, rejected {counts.get('reject', 0)} new ones, forgot "
            f"{len(self.forgotten)}, decided {len(self.changed)} old ones anew; {self.kept} are learned from.",
            *(f"  rejected: {row.image_path} (score {row.score:.1f}, by the {row.decided_by})"
              for row in self.images[self.images.decision == "reject"].itertuples()),
            *(f"  skipped: {path}: {reason}" for path, reason in self.skipped.items()),
        ]  # fmt: skip
        for (name, by), rows in self.images[self.images.variant != ""].groupby(["variant", "variant_by"]):
            told = "as you name it" if by == "user" else "by likeness: neither a column nor the folder names it"
            found.append(f"  {len(rows)} of variant {name}, {told}")
        before, after = self.threshold
        if self.recalibrated:
            found.append(f"Threshold {after:.4g}, before {before:.4g}.")
        else:
            found.append(
                f"Threshold {after:.4g} as before: it was not chosen from the training images. "
                "Choose it anew: metarefine calibrate."
            )
        state = (
            f"drift {self.drift:.3f} bits per dimension, {self.share_changed:.0%} of the images changed, "
            f"{self.share_forgotten:.0%} of those of the training forgotten"
        )
        due = (
            f"A new training is due: {self.training_due}." if self.training_due else f"No new training is due: {state}."
        )
        return [*found, due]
