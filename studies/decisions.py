"""Can decisions be trusted, on folders of every kind? The engine over families, sizes and shares of dirty images.

    python -m studies.decisions --out studies/results/decisions.csv --features FOLDER \
        --data elpv-mono elpv-poly PARTS/screw:150 PARTS/commutator@416x160:150:ksdd

A row is a folder drawn from a family: what kind it is taken for, what is rejected, how many looks down the order find
90 % of the dirty images, and image AUROC on the images not drawn, of the density of all images, of what is kept, and of
the truly clean part. Features of a family are computed once and kept in the folder; ``--summary`` prints the tables of
the rows that are there.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from anomalib_metarefine.benchmark.data_sets import DataSet
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.refinement.engine import Result
from anomalib_metarefine.refinement.fitting import image_scores
from studies.common import add_grid, features_of, finished, markdown, record, refine
from studies.data_sets import parse_data_set

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = ["family", "images", "contamination", "seed", "settings"]
_TEST = 150  # images of a kind, at most


class Family(NamedTuple):
    """All images of a data set: embeddings ``[N x P x C]``, which are dirty ``[N]``, rows and columns of patches."""

    embeddings: torch.Tensor
    dirty: np.ndarray
    grid: tuple[int, int]


class Folder(NamedTuple):
    """Rows of a family that are drawn, and those left for testing."""

    drawn: np.ndarray
    test: np.ndarray


def load(data: DataSet, cache: Path) -> Family:
    """Features of all images of a data set, from the cache where they are in it."""
    file = cache / f"{data.name}.npz"
    if not file.is_file():
        source = data.datamodule(0)
        source.setup()
        samples = pd.concat([source.train_data.samples, source.test_data.samples]).drop_duplicates("image_path")
        store, grid = features_of(samples.image_path, data)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, x=store.images().half().numpy(), dirty=samples.label_index.to_numpy() == 1, grid=np.array(grid))
    with np.load(file) as found:
        rows, columns = found["grid"].tolist()
        return Family(torch.from_numpy(found["x"]), found["dirty"], (rows, columns))


def draw(family: Family, images: int, contamination: float, seed: int) -> Folder:
    """A folder, and good and dirty images that are not in it."""
    rng, dirty = np.random.default_rng(seed), round(contamination * images)
    good, bad = (rng.permutation(np.flatnonzero(family.dirty == kind)) for kind in (False, True))
    split = min(images - dirty, len(good) - 15)
    drawn = rng.permutation(np.concatenate([good[:split], bad[:dirty]]))
    return Folder(drawn, np.concatenate([good[split:][:_TEST], bad[dirty:][:_TEST]]))


def examine(family: Family, folder: Folder, seed: int, **settings: object) -> dict[str, object]:
    """The row of a folder, without its key."""
    dirty = family.dirty[folder.drawn]
    result = refined(family, folder.drawn, seed, **settings)
    scores, rejected, structure = result.scales.scores, ~result.kept, result.structure
    row: dict[str, object] = {
        "kind": structure.kind,
        "layout": structure.layout,
        "reliability": structure.reliability,
        "minority": int((structure.variants > 0).sum()),
        "drawn": len(dirty),
        "dirty": int(dirty.sum()),
        "rejected": int(rejected.sum()),
        "hits": int((rejected & dirty).sum()),
        "order_AUROC": roc_auc_score(dirty, scores) if dirty.any() else float("nan"),
        "looks": looks(scores, dirty),
        "rounds": len(result.refinement.rounds),
        "left_out": result.refinement.unusual_patches,
    }
    labels = family.dirty[folder.test]
    trained = {"refined": result}
    if "rule" not in settings:
        alike = {"rounds": 0, "structure": structure.kind}
        trained["raw"] = refined(family, folder.drawn, seed, **alike)
        trained["clean"] = refined(family, folder.drawn[~dirty], seed, **alike)
    for name in ("raw", "refined", "clean"):
        known = name in trained and 0 < labels.sum() < len(labels)
        row[f"AUROC_{name}"] = _auroc(trained[name], family, folder.test) if known else float("nan")
    return row


def looks(scores: np.ndarray, dirty: np.ndarray, recall: float = 0.9) -> float:
    """Images to look at, highest score first, until a share ``recall`` of the dirty ones is found."""
    if not dirty.any():
        return float("nan")
    found = dirty[np.argsort(-scores, kind="stable")].cumsum()
    return float(np.argmax(found >= np.ceil(recall * dirty.sum())) + 1)


def run(
    done: set[tuple], families: list[DataSet], cache: Path, sizes: list[int], shares: list[float], seeds: list[int],
    rules: list[str],
) -> Iterator[dict[str, object] | str]:  # fmt: skip
    """Rows that are not in the table yet."""
    for data in families:
        family = load(data, cache)
        for size, seed, share, rule in itertools.product(sizes, seeds, shares, rules):
            key = (data.name, size, share, seed, rule)
            if key in done or (family.dirty.sum() < round(share * size)) or (~family.dirty).sum() < size / 2:
                continue
            settings = {} if rule == "auto" else {"rule": rule}
            folder = draw(family, size, share, seed)
            yield dict(zip(KEY, key, strict=True)) | examine(family, folder, seed, **settings)


def summarise(rows: pd.DataFrame) -> str:
    """Markdown: a row a family, over seeds and sizes."""
    lines = []
    for name, group in rows.groupby("family", sort=False):
        clean, dirty = group[group.contamination == 0], group[group.contamination > 0]
        few, many = dirty[dirty.contamination <= 0.1], dirty[dirty.contamination > 0.1]
        rejected, hits = dirty.rejected.sum(), dirty.hits.sum()
        worst = (clean.rejected / clean.drawn).max() if len(clean) else float("nan")
        lines.append([
            str(name), ", ".join(sorted(group.kind.unique())), str(len(group)),
            f"{clean.rejected.sum() / max(clean.drawn.sum(), 1):.1%}, {worst:.1%}",
            f"{rejected}, {hits / rejected:.0%}" if rejected else "none",
            *(f"{part.hits.sum() / max(part.dirty.sum(), 1):.0%}" for part in (few, many)),
            f"{dirty.order_AUROC.mean():.3f}", f"{(dirty.looks / dirty.dirty).mean():.1f}",
            *(_trained(group[group.contamination == share]) for share in (0, 0.1, 0.4)),
        ])  # fmt: skip
    header = [
        "family",
        "taken for",
        "folders",
        "rejected of clean folders: all, worst",
        "rejected of dirty ones: dirty",
    ]
    header += ["found up to 10 %", "found past 10 %", "AUROC of the order", "looks a dirty image"]
    header += [f"image AUROC at {share} %: raw, refined, clean" for share in (0, 10, 40)]
    return markdown(header, lines)


def _trained(group: pd.DataFrame) -> str:
    found = group.dropna(subset=["AUROC_raw", "AUROC_refined", "AUROC_clean"])
    return ", ".join(f"{100 * found[f'AUROC_{name}'].mean():.1f}" for name in ("raw", "refined", "clean")) * (
        len(found) > 0
    )


def refined(family: Family, drawn: np.ndarray, seed: int, **settings: object) -> Result:
    """The engine on images of a family, by their rows."""
    store = FeatureStore(memory_limit_mb=4096)
    store.add([f"{row:05d}" for row in range(len(drawn))], family.embeddings[torch.from_numpy(drawn)])
    return refine((store, family.grid), seed, **settings)


@torch.no_grad()
def _auroc(result: Result, family: Family, test: np.ndarray) -> float:
    density, images = result.density, result.images
    patches = images.whitening(family.embeddings[torch.from_numpy(test)].float())
    scores = image_scores(density.score(patches, images.positions), tail=0.03)
    return float(roc_auc_score(family.dirty[test], scores))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_grid(parser, [0, 0.05, 0.1, 0.2, 0.4])
    add = parser.add_argument
    add("--features", type=Path, required=True, help="folder for the features of whole families")
    add("--images", type=int, nargs="+", default=[40, 150, 300], help="sizes of the folders drawn")
    add("--rules", nargs="+", default=["auto"], help="rejection rules")
    add("--summary", action="store_true", help="print the tables of the rows that are there")
    options = parser.parse_args(argv)
    families = [parse_data_set(text) for text in options.data]
    done = finished(options.out, KEY)
    grid = (options.images, options.contamination, options.seeds, options.rules)
    record(run(done, families, options.features, *grid), options.out)
    if options.summary:
        print(summarise(pd.read_csv(options.out)))


if __name__ == "__main__":
    main()
