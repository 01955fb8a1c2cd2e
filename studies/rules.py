"""The picture of docs/rules.md: the fence of every rejection rule on the same real scores.

    python -m studies.rules [--contamination 0.2] [--out docs/figures/rules.png]

Takes about a minute per run on two CPU cores. Prints the table of docs/rules.md, too.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from anomalib_metarefine.refinement.posterior import further_scales
from matplotlib import pyplot as plt

from anomalib_metarefine.refinement.rules import RULES, get_rule
from anomalib_metarefine.robust import lower_side_scale

_GOOD, _DEFECTIVE, _FENCE = "#56B4E9", "#D55E00", "#000000"  # Okabe and Ito's palette: safe for colour-blind readers
_IMAGES = 300


@dataclass(frozen=True)
class Fence:
    """What one rule does to the scores."""

    rule: str
    score: float
    rejected: int
    dirty: int

    def __str__(self) -> str:
        if not self.rejected:
            return "rejects none"
        return f"rejects {self.rejected}, {self.dirty} defective"


def training_scores(contamination: float) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Scores of 300 ELPV monocrystalline training images by which the first round of refinement rejects.

    Args:
        contamination (float): Share of real defective images among them.

    Returns:
        tuple[np.ndarray, list[np.ndarray], np.ndarray]: Scores ``[300]``, in lower-side spreads from their centre (no
            rule minds); those on the further scales of rule ``auto``; whether an image is defective.
    """
    from anomalib.engine import Engine
    from lightning import seed_everything

    from anomalib_metarefine import ELPV, MetaRefine
    from anomalib_metarefine.data.contamination import Contaminated

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    datamodule = Contaminated(ELPV("mono", _IMAGES, seed=0), contamination, "no-overlap", seed=0)
    model = MetaRefine(rounds=1, rule="share:0", meta_steps=0, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, enable_model_summary=False, limit_val_batches=0)
        engine.fit(model, datamodule=datamodule)
    refinement = model.refinement
    centre, spread = lower_side_scale(np.array(refinement.scores))
    scores = (np.array(refinement.scores) - centre) / spread
    return scores, further_scales(refinement.parts), np.isin(refinement.paths, datamodule.injected)


def all_fences(scores: np.ndarray, further: list[np.ndarray], dirty: np.ndarray) -> list[Fence]:
    """Every rule with its defaults, the lowest fence first; ``count`` is told the true number."""
    told = {"count": f"count:{dirty.sum()}", "share": "share:0.1"}
    fences = []
    for name in RULES:
        spec = told.get(name, name)
        rule = get_rule(spec)
        score = rule.fence(scores, further=further) if name == "auto" else rule.fence(scores)
        rejected = scores > score
        fences.append(Fence(spec, score, int(rejected.sum()), int(dirty[rejected].sum())))
    return sorted(fences, key=lambda fence: (fence.score, fence.rule))


def draw(scores: np.ndarray, dirty: np.ndarray, fences: list[Fence], path: Path) -> None:
    """Histogram of the scores, and below it on the same axis what each rule rejects."""
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9, 7), height_ratios=[1, 1.3], layout="constrained")
    low, high = float(scores.min()), float(scores.max())
    margin = 0.03 * (high - low)
    above.hist(
        [scores[~dirty], scores[dirty]],
        np.linspace(low, high, 60),
        stacked=True,
        color=[_GOOD, _DEFECTIVE],
        edgecolor="white",
        linewidth=0.4,
        label=[f"good ({(~dirty).sum()})", f"defective ({dirty.sum()})"],
    )
    above.set(ylabel="training images", title=f"ELPV monocrystalline, {dirty.mean():.0%} of {len(scores)} images dirty")
    above.legend()
    end = high + margin
    for row, fence in enumerate(fences):
        # Every image is a tick on every row, so that one sees what lies on either side of the fence.
        below.vlines(scores[~dirty], row - 0.28, row, color=_GOOD, linewidth=0.7)
        below.vlines(scores[dirty], row, row + 0.28, color=_DEFECTIVE, linewidth=0.7)
        if fence.score < high:
            below.barh(row, end - fence.score, left=fence.score, height=0.8, color=_FENCE, alpha=0.1)
            below.vlines(fence.score, row - 0.4, row + 0.4, color=_FENCE, linewidth=2)
        below.text(end + margin / 2, row, str(fence), va="center", fontsize=10)
    below.set_yticks(range(len(fences)), [fence.rule for fence in fences], family="monospace", fontsize=11)
    below.invert_yaxis()
    below.set(
        xlim=(low - margin, end),
        xlabel="image score (lower-side spreads from the centre of the densest half)",
        title="Fence (line) and rejected range (grey) of each rule; a tick is an image",
    )
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Compute the scores, print the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contamination", type=float, default=0.2, help="share of dirty images (default: 0.2)")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/rules.png"), help="the picture to write")
    arguments = parser.parse_args()
    scores, further, dirty = training_scores(arguments.contamination)
    fences = all_fences(scores, further, dirty)
    print(f"{'rule':<10} {'fence':>6} {'rejected':>8} {'dirty':>6}")
    for fence in fences:
        print(f"{fence.rule:<10} {fence.score:>6.2f} {fence.rejected:>8} {fence.dirty:>6}")
    draw(scores, dirty, fences, arguments.out)
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
