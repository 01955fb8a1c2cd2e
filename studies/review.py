"""How many looks does a review take, and is what it says of the rest true? A simulated person and the real session.

    python -m studies.review --out studies/results/review.csv --features FOLDER --curations FOLDER \
        --data elpv-mono elpv-poly PARTS/screw:150 PARTS/commutator@416x160:150:ksdd

A row is a folder drawn from a family, as in `studies.decisions`. The person knows the truth, and answers wrongly at
random, two times in a hundred. *Looks* go on until 90 % of the dirty images were shown: by the review, down the first
order, in random order. Further columns are of the moment when the review says that one can stop, and of all moments:
whether its "at most y left" was true. The engine's part of a folder is kept under ``--curations``; ``--summary`` prints
the tables.

``review_queue.csv`` beside the rows is of the revision before the page (a028ced): there `curate`, given the same
features, and the whole order of `propose(manifest, budget)`, which put rejected images last.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.curation.evidence import gather_evidence
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.review.session import Session
from anomalib_metarefine.curation.run_folder import EVIDENCE_FILE, MANIFEST_FILE, RUN_FILE
from studies.common import add_grid, finished, markdown, record
from studies.data_sets import parse_data_set
from studies.decisions import draw, load, looks, refined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from studies.decisions import Family

KEY = ["family", "images", "contamination", "seed"]
_WRONG = 0.02  # of the answers
_RECALL = 0.9
_WAYS = ("looks", "looks_first_order", "looks_random")


def curated(family: Family, images: int, contamination: float, seed: int, folder: Path) -> np.ndarray:
    """Curate a folder that is drawn from a family, unless it is there; which of its images are dirty, ``[N]``."""
    drawn = draw(family, images, contamination, seed).drawn
    if not (folder / MANIFEST_FILE).is_file():
        result = refined(family, drawn, seed)
        scores, names = result.scales.scores, [f"{row:05d}.png" for row in range(len(drawn))]
        table = pd.DataFrame({
            "image_path": names,
            "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names],
            "decision": np.where(result.kept, "keep", "reject"),
            "decided_by": "rule",
            "round": 0,
            "reason": "",
            "score": scores,
            "fence_distance": float("nan"),
            "q_value": float("nan"),
            "variant": result.structure.variants,
            "quality": "",
        })  # fmt: skip
        evidence = gather_evidence(result, names, np.argsort(-scores)[:100])
        run = {"root": "/", "structure": result.structure.summary()}
        Manifest(table, run).write(folder, {EVIDENCE_FILE: evidence.save})
    return family.dirty[drawn]


def reviewed(folder: Path, dirty: np.ndarray, seed: int) -> dict[str, object]:
    """A whole review by a person who is wrong now and then: the row of a folder, without its key."""
    rng, shown, states = np.random.default_rng(seed), [], []
    with tempfile.TemporaryDirectory() as copy:
        for name in (MANIFEST_FILE, RUN_FILE, EVIDENCE_FILE):
            shutil.copy(folder / name, copy)
        session = Session(copy, seed=seed)
        truth = np.array([dirty[int(Path(image.path).stem)] for image in session.images])
        scores = np.array([image.row["score"] for image in session.images])
        while (page := session.next_page("person")) is not None:
            said = {i: truth[i] != (rng.random() < _WRONG) for i in page.images}
            session.answer({i: "reject" if bad else "keep" for i, bad in said.items()})
            shown += page.images
            states.append((session.standing(), int(truth[shown].sum())))
    count, total = int(truth.sum()), len(truth)
    stop, found = next((state, found) for state, found in states if state.stop)
    bounds = [state.at_most >= count - found for state, found in states]
    return {
        "drawn": total,
        "dirty": count,
        "order_AUROC": roc_auc_score(truth, scores),
        "looks": looks(-np.argsort(shown), truth),
        "looks_first_order": looks(scores, truth),
        "looks_random": np.ceil(_RECALL * count) * (total + 1) / (count + 1),
        "stop_looks": stop.looked,
        "stop_recall": found / count,
        "stop_left": count - found,
        "stop_at_most": stop.at_most,
        "stop_why": stop.reason,
        "bound_at_stop": stop.at_most >= count - found,
        "bound_always": all(bounds),
    }


def run(
    done: set[tuple], families: list[DataSet], cache: Path, curations: Path, sizes: list[int], shares: list[float],
    seeds: list[int],
) -> Iterator[dict[str, object] | str]:  # fmt: skip
    """Rows that are not in the table yet."""
    for data in families:
        family = load(data, cache)
        for size, seed, share in itertools.product(sizes, seeds, shares):
            key = (data.name, size, share, seed)
            if key in done or family.dirty.sum() < round(share * size) or (~family.dirty).sum() < size / 2:
                continue
            folder = curations / "-".join(map(str, key))
            dirty = curated(family, size, share, seed, folder)
            yield dict(zip(KEY, key, strict=True)) | reviewed(folder, dirty, seed)


def summarise(rows: pd.DataFrame) -> str:
    """Markdown: a row a family, and all of them."""
    groups = [*rows.groupby("family", sort=False), ("all", rows), ("first AUROC of 0.95 or more", _clear(rows))]
    lines = []
    for name, group in groups:
        ends = group[group.stop_looks < group.drawn]
        lines.append([
            str(name), str(len(group)),
            *(f"{(group[column] / group.dirty).mean():.1f}" for column in _WAYS),
            f"{(group.looks <= 1.5 * group.dirty + 15).mean():.0%}",
            f"{len(ends) / len(group):.0%}", f"{(group.stop_looks / group.drawn).mean():.0%}",
            f"{(ends.stop_recall >= _RECALL).mean():.0%}" if len(ends) else "",
            f"{(group.stop_looks <= 1.5 * group.dirty + 15).mean():.0%}",
            f"{group.bound_at_stop.mean():.0%}, {group.bound_always.mean():.0%}",
        ])  # fmt: skip
    header = ["family", "folders"]
    header += [f"looks a dirty image until 90 % are found: {kind}" for kind in ("review", "first order", "random")]
    header += ["within 1.5 looks a dirty image + 15", "stops before the end", "looked at by then"]
    header += ["of these: 90 % found", "stops within 1.5 looks a dirty image + 15", "at most y: true then, always"]
    return markdown(header, lines)


def compare(rows: pd.DataFrame, queue: pd.DataFrame) -> str:
    """Markdown: looks a dirty image until 90 % are found, on the folders of which the former queue is known, too.

    Args:
        rows (pd.DataFrame): Of this study.
        queue (pd.DataFrame): ``looks_queue`` by folder, and ``looks_queue_after_rule`` where what the former rule had
            rejected counts as found without a look.
    """
    both = rows.merge(queue, on=KEY)
    ways = [*_WAYS, "looks_queue", "looks_queue_after_rule"]
    lines = [
        [str(name), str(len(group)), *(f"{(group[way] / group.dirty).mean():.1f}" for way in ways)]
        for name, group in [*both.groupby("family", sort=False), ("all", both)]
    ]
    return markdown(["family", "folders", "review", "first order", "random", "former queue", "after its rule"], lines)


def _clear(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.order_AUROC >= 0.95]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser, [0.02, 0.05, 0.1, 0.2, 0.4])
    add = parser.add_argument
    add("--features", type=Path, required=True, help="folder for the features of whole families")
    add("--curations", type=Path, required=True, help="folder for what the engine says of each folder drawn")
    add("--images", type=int, nargs="+", default=[60, 150, 300], help="sizes of the folders drawn")
    add("--summary", action="store_true", help="print the table of the rows that are there")
    options = parser.parse_args(argv)
    families = [parse_data_set(text) for text in options.data]
    grid = (options.images, options.contamination, options.seeds)
    record(run(finished(options.out, KEY), families, options.features, options.curations, *grid), options.out)
    if options.summary:
        rows, queue = pd.read_csv(options.out), options.out.with_name("review_queue.csv")
        print(summarise(rows))
        if queue.exists():
            print(compare(rows, pd.read_csv(queue)))


if __name__ == "__main__":
    main()
