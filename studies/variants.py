"""One model of several variants or categories against a model of each: who is rejected, and who is detected.

    python -m studies.variants --out studies/results/variants.csv --features FOLDER --data elpv-mono elpv-poly \
        --mix 200+20 200+40 150+100 --seeds 0 1 2 3 4

A row is a member of a mixture: its images that were rejected, good and dirty, and its image AUROC on images that were
not drawn, of the one model and of a model of its own. ``--given`` tells the engine which image belongs to which member.
``--start`` learns the initialisation in another way; with ``--no-rounds`` nothing is rejected, and no model of its own
is trained. Data sets must have one grid of patches. Features are cached as in `studies.decisions`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.refinement.fitting import image_scores
from studies.common import add_grid, finished, markdown, record, refine, spread
from studies.data_sets import parse_data_set
from studies.decisions import Family, Folder, draw, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anomalib_metarefine.refinement.engine import Result

KEY = ["mixture", "contamination", "seed", "variants", "start", "member"]
STARTS: dict[str, dict[str, Any]] = {
    "maml": {},
    "pretraining": {"meta_algorithm": "pretraining"},
    "untrained": {"meta_steps": 0},
}


def trained(members: dict[str, tuple[Family, Folder]], seed: int, **settings: Any) -> Result:  # noqa: ANN401
    """The engine on the images drawn from several families, each in a folder of its own, in this order."""
    store = FeatureStore(memory_limit_mb=4096)
    for name, (family, folder) in members.items():
        paths = [f"{name}/{row:05d}" for row in range(len(folder.drawn))]
        store.add(paths, family.embeddings[torch.from_numpy(folder.drawn)])
    first = next(iter(members.values()))[0]
    return refine((store, first.grid), seed, **settings)


@torch.no_grad()
def auroc(result: Result, family: Family, test: np.ndarray) -> float:
    """Image AUROC of a model on images of one family."""
    scores = []
    for rows in np.array_split(test, max(1, len(test) // 32)):
        patches = result.images.whitening(family.embeddings[torch.from_numpy(rows)].float())
        scores.append(image_scores(result.density.score(patches, result.images.positions), tail=0.03))
    return float(roc_auc_score(family.dirty[test], np.concatenate(scores)))


def run(
    done: set[tuple], data: Sequence[DataSet], cache: Path, mixtures: Sequence[str], grid: Sequence[Sequence[Any]],
    rounds: bool,
) -> Iterator[dict[str, object]]:  # fmt: skip
    """Rows that are not in the table yet; ``grid`` has contaminations, seeds, variants and starts."""
    families = {one.name: load(one, cache) for one in data}
    alone: dict[tuple, Result] = {}
    for mixture, share, seed, variants, start in itertools.product(mixtures, *grid):
        key = (mixture, share, seed, variants, start)
        if all((*key, name) in done for name in families):
            continue
        settings = STARTS[start] | ({} if rounds else {"rounds": 0})
        counts = map(int, mixture.split("+"))
        members = {
            name: (family, draw(family, count, share, seed))
            for (name, family), count in zip(families.items(), counts, strict=True)
        }
        one = trained(members, seed, variants=variants, **settings)
        first = 0
        for name, (family, folder) in members.items():
            rejected = ~one.kept[first : first + len(folder.drawn)]
            found = one.structure.variants[first : first + len(folder.drawn)]
            first += len(folder.drawn)
            which = (name, len(folder.drawn), share, seed, start)
            if rounds and which not in alone:
                alone[which] = trained({name: members[name]}, seed, **settings)
            dirty = family.dirty[folder.drawn]
            yield dict(zip(KEY, (*key, name), strict=True)) | {
                "kind": one.structure.kind,
                "images": len(dirty),
                "variant": int(np.bincount(found).argmax()),
                "in_variant": int(np.bincount(found).max()),
                "good_rejected": int((rejected & ~dirty).sum()),
                "dirty_rejected": int((rejected & dirty).sum()),
                "AUROC_one": auroc(one, family, folder.test),
                "AUROC_alone": auroc(alone[which], family, folder.test) if rounds else float("nan"),
            }


def summarise(rows: pd.DataFrame) -> str:
    """Markdown: a row a member, over seeds."""
    lines = []
    for key, group in rows.groupby([name for name in KEY if name != "seed"], sort=False):
        mixture, share, variants, start, member = key
        rejected, hits = group.good_rejected + group.dirty_rejected, group.dirty_rejected
        lines.append([
            mixture, f"{share:.0%}", variants, start, member, str(len(group)),
            ", ".join(map(str, group.good_rejected)),
            f"{hits.sum() / rejected.sum():.0%} of {rejected.sum()}" if rejected.sum() else "none",
            spread(100 * group.AUROC_one, 1), spread(100 * group.AUROC_alone, 1),
            spread(100 * (group.AUROC_one - group.AUROC_alone), 1),
        ])  # fmt: skip
    header = ["images", "dirty", "variants", "start", "member", "draws", "good rejected, draw by draw"]
    header += ["rejected: dirty", "AUROC of one model", "of its own", "difference"]
    return markdown(header, lines)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser, [0])
    add = parser.add_argument
    add("--features", type=Path, required=True, help="folder for the features of whole families")
    add("--mix", nargs="+", required=True, metavar="N+M", help="images of each data set")
    add("--given", action="store_true", help="tell which image belongs to which data set; else that is found out")
    add("--start", nargs="+", choices=list(STARTS), default=["maml"], help="where the flow starts from")
    add("--no-rounds", action="store_true", help="train on everything")
    add("--summary", action="store_true", help="print the table of the rows that are there")
    options = parser.parse_args(argv)
    grid = (options.contamination, options.seeds, ["folders" if options.given else "auto"], options.start)
    data = [parse_data_set(text) for text in options.data]
    done = finished(options.out, KEY)
    record(run(done, data, options.features, options.mix, grid, rounds=not options.no_rounds), options.out)
    if options.summary:
        print(summarise(pd.read_csv(options.out)))


if __name__ == "__main__":
    main()
