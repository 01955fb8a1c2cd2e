"""Curation of a training set: which images are dirty, and why; for any anomalib model.

One pass of the backbone, meta-training and refinement as in `MetaRefine` itself, an estimate of the contamination, and
a decision about every image. Nothing of the user's is changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from anomalib_metarefine.curation.evidence import Evidence, gather_evidence
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.report import write_report
from anomalib_metarefine.curation.run_folder import EVIDENCE_FILE, REPORT_FILE, locked
from anomalib_metarefine.features.backbone import OFFLINE_BACKBONE, Backbone
from anomalib_metarefine.features.executors import Engine, make_executor
from anomalib_metarefine.features.gather import gather, versions
from anomalib_metarefine.images.answers import load, read
from anomalib_metarefine.images.hashes import data_sha256
from anomalib_metarefine.images.quality import ImageFacts
from anomalib_metarefine.images.regions import as_text
from anomalib_metarefine.images.sources import EXTENSIONS, listing
from anomalib_metarefine.images.storage import located
from anomalib_metarefine.progress import progress_bars
from anomalib_metarefine.refinement.engine import Result, refine_images
from anomalib_metarefine.refinement.rules import get_rule, q_values
from anomalib_metarefine.rule_settings import AutoSettings
from anomalib_metarefine.settings import Settings

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule

    from anomalib_metarefine.refinement.rounds import Refinement

_REVIEW_SHARE = 0.3  # of clean images expected up to an image, up to which a person should look
_MOST_REVIEW = 0.1  # share of the images that a person is asked to look at
_SHOWN = 100  # images with evidence, those with the highest scores
_MOST_SHOWN = 500  # rejected images and those for review with evidence, at most


Decisions: TypeAlias = "str | Path | dict[str, str]"


class Curation(NamedTuple):
    """What curation found.

    Attributes:
        manifest (Manifest): One row per image, and what was run.
        evidence (Evidence): Maps, neighbours and groups of the images that are rejected or to be reviewed.
    """

    manifest: Manifest
    evidence: Evidence

    def write(self, folder: str | Path, parquet: bool | None = None) -> Path:
        """Write ``manifest.csv``, ``run.json``, ``evidence.npz`` and ``report.html``, all in one step or none.

        Args:
            folder (str | Path): Made if it does not exist; may be an address, see `located`.
            parquet (bool | None): See `Manifest.write`.

        Returns:
            Path: The report.
        """
        others = {
            EVIDENCE_FILE: self.evidence.save,
            REPORT_FILE: lambda path: write_report(self.manifest, self.evidence, path, located(folder)),
        }
        self.manifest.write(folder, others, parquet)
        return located(folder) / REPORT_FILE


def curate(
    data: str | Path | AnomalibDataModule | Iterable[str | Path],
    *,
    root: str | Path | None = None,
    extensions: Sequence[str] = EXTENSIONS,
    backbone: str = OFFLINE_BACKBONE,
    layers: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    decisions: Decisions | Sequence[Decisions] | None = None,
    quality: bool = True,
    bit_depth: int | None = None,
    ignore: str | Path | None = None,
    memory_limit_mb: float = 2048,
    progress: bool = True,
    engine: Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    gpus_per_worker: float = 0,
    work: str | Path | None = None,
    **settings: Any,  # noqa: ANN401
) -> Curation:
    """Decide about every training image: keep it, reject it, or have a person look.

    Args:
        data (str | Path | AnomalibDataModule | Iterable[str | Path]): A folder, a CSV or Parquet of paths, an anomalib
            datamodule or the YAML of one, or paths; see `read_source`.
        root (str | Path | None): What paths in a table are relative to.
        extensions (Sequence[str]): File names to look for in a folder.
        backbone (str): Any timm architecture.
        layers (Sequence[str] | None): Modules of the backbone to read; ``None`` takes strides 8 and 16.
        image_size (tuple[int, int] | None): Height and width in pixels; ``None`` takes the shape of the images, at the
            area of 256 x 256 pixels.
        seed (int): Of everything random.
        batch_size (int): Images at a time in the backbone.
        decisions (Decisions | Sequence[Decisions] | None): What a person decided: a CSV file, an output folder of an
            earlier run, or keep and reject by the SHA-256 of the image; of several, the last one wins. Decisions hold
            against the rule, and guide the refinement.
        quality (bool): Look for duplicates, blur and bad exposure too.
        bit_depth (int | None): Bits in use of files with more than 8; ``None`` takes those of the file.
        ignore (str | Path | None): Regions of all images to ignore: a picture or polygons, see `read_regions`.
        memory_limit_mb (float): Past it, features go to files in a temporary folder.
        progress (bool): Show progress bars.
        engine (Engine): Where passes over the images run; see `make_executor`.
        workers (int | None): Processes or actors.
        address (str | None): Of a Ray cluster.
        gpus_per_worker (float): Of Ray.
        work (str | Path | None): Folder for features, see `collect_features`; a run that was killed goes on from there.
        **settings (Any): Everything else that `Settings` lists, such as ``rule="iqr"``.

    Returns:
        Curation: Manifest and evidence.

    Raises:
        TypeError: If there is no setting of a name.
        ValueError: If no image can be read, or a setting can't be used.
        FileNotFoundError: If there are no such data.

    Example:
        >>> curation = curate("line7/good")  # doctest: +SKIP
        >>> curation.write("line7-curation")  # doctest: +SKIP
        >>> Engine().train(Padim(), datamodule=curation.manifest.datamodule(test=my_datamodule))  # doctest: +SKIP
    """
    chosen = Settings(**settings)
    if address is not None and work is None:
        msg = "Ray at an address needs a folder for features that all its machines see. Pass one (--work)."
        raise ValueError(msg)
    executor = make_executor(engine, workers, address, gpus_per_worker)
    work = None if work is None else Path(work).absolute()
    with nullcontext() if work is None else locked(work), progress_bars(progress) as bars:
        network = Backbone(backbone, layers)
        gathered = gather(
            data, network, backbone, bars, root=root, extensions=extensions, image_size=image_size,
            batch_size=batch_size, memory_limit_mb=memory_limit_mb, bit_depth=bit_depth, ignore=ignore,
            executor=executor, work=work,
        )  # fmt: skip
        source, store, seconds = gathered.source, gathered.store, gathered.seconds
        facts = gathered.facts if quality else [replace(fact, findings=()) for fact in gathered.facts]
        known = _known(decisions, dict(zip(source.names, facts, strict=True)))
        begin = time.perf_counter()
        row_of = {str(source.paths[i]): i for i in gathered.readable}
        rows = [row_of[path] for path in store.paths]
        decided = {place: known[facts[row].sha256] for place, row in enumerate(rows) if facts[row].sha256 in known}
        answers = {place: decision == "keep" for place, decision in decided.items()}
        labels = [source.variants[source.paths[row]] for row in rows] if source.variants else None
        result = refine_images(
            store, gathered.grid, chosen, seed, bars, answers=answers, labels=labels, looked=gathered.looked
        )
        seconds["refinement"] = time.perf_counter() - begin
        begin = time.perf_counter()
        names = source.names
        table = _decide(result, decided, getattr(get_rule(chosen.rule), "tail", AutoSettings.tail))
        table.insert(0, "image_path", [names[row] for row in rows])
        evidence = gather_evidence(result, table.image_path.tolist(), _to_show(table))
        seconds["evidence"] = time.perf_counter() - begin
    left_out = {row: fact.unreadable or "" for row, fact in enumerate(facts) if fact.unreadable is not None}
    left_out |= {row_of[path]: reason for path, reason in store.left_out.items()}
    table = pd.concat([table, _unreadable([names[row] for row in left_out], list(left_out.values()))])
    by_name = dict(zip(names, facts, strict=True))
    table["sha256"] = [by_name[name].sha256 for name in table.image_path]
    table["quality"] = ["; ".join(by_name[name].findings) for name in table.image_path]
    run = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "root": str(source.root),
        "source": str(data) if isinstance(data, str | Path) else source.name,
        "versions": versions(),
        "seed": seed,
        "settings": {
            "backbone": backbone,
            "layers": list(network.layers),
            "image_size": list(gathered.image_size),
            "quality": quality,
            "bit_depth": bit_depth,
            "ignore": None if ignore is None else str(ignore),
            **chosen.as_dict(),
        },
        "data": {"images": len(facts), "sha256": data_sha256(names, [fact.sha256 for fact in facts])},
        "structure": result.structure.summary(),
        "ignored": None if gathered.looked is None else as_text(gathered.looked, gathered.grid),
        "answers": len(answers),
        "rounds": [
            {"number": number, "fence": r.fence if np.isfinite(r.fence) else None, "rejected": r.rejected}
            for number, r in enumerate(result.refinement.rounds, 1)
        ],
        "stop_reason": result.refinement.stop_reason,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
    }
    return Curation(Manifest(table, run), evidence)


def _known(decisions: Decisions | Sequence[Decisions] | None, facts: dict[str, ImageFacts]) -> dict[str, str]:
    """Keep or reject by SHA-256."""
    if decisions is None:
        return {}
    if isinstance(decisions, dict):
        return decisions
    if not isinstance(decisions, str | Path):
        return {sha256: answer for part in decisions for sha256, answer in _known(part, facts).items()}
    if Path(decisions).is_dir():
        return load(decisions)
    table = read(decisions)
    nameless = (table.sha256 == "") & ~table.image_path.isin(list(facts))
    if nameless.any():
        msg = f"{decisions} has decisions on images that are not here: {listing(table.image_path[nameless].tolist())}. "
        raise ValueError(msg + "Paths must be relative to the root; the sha256 of an image always finds it.")
    hashes = [row.sha256 or facts[row.image_path].sha256 for row in table.itertuples()]
    return dict(zip(hashes, table.decision, strict=True))


def _decide(result: Result, decided: dict[int, str], tail: float) -> pd.DataFrame:
    """One row per scored image, by row of the store, without its name."""
    refinement, scores = result.refinement, result.scales.scores
    fence = refinement.rounds[-1].fence if refinement.rounds else np.inf
    shares = q_values(result.scales, tail)
    decision = np.where(result.kept, "keep", "reject").astype(object)
    doubtful = result.kept & (shares <= _REVIEW_SHARE)
    worst = [i for i in np.argsort(-scores, kind="stable") if doubtful[i] and i not in decided]
    decision[worst[: max(1, round(_MOST_REVIEW * len(scores)))]] = "review"
    by = np.full(len(scores), "rule", dtype=object)
    for place, answer in decided.items():
        decision[place], by[place] = answer, "user"
    table = pd.DataFrame({
        "decision": decision,
        "decided_by": by,
        "round": np.where(decision == "reject", _rejected_since(refinement), 0),
        "reason": "",
        "score": scores,
        "fence_distance": scores - fence if np.isfinite(fence) else np.nan,
        "q_value": shares,
        "variant": result.structure.variants,
        "likeness": np.nan if result.scales.likeness is None else result.scales.likeness,
        **{f"score_{name}": values for name, values in result.scales.parts.items()},
        **{f"score_round_{number}": r.scores for number, r in enumerate(refinement.rounds, 1)},
    })  # fmt: skip
    place = table.score.rank(ascending=False, method="first").astype(int)
    table["reason"] = [_reason(row, rank, len(table)) for row, rank in zip(table.itertuples(), place, strict=True)]
    return table


def _rejected_since(refinement: Refinement) -> np.ndarray:
    """Round from which on each image lay past the fence; 0 for those inside at the end."""
    since = np.zeros(len(refinement.paths), dtype=int)
    for number, r in enumerate(refinement.rounds, 1):
        past = np.array(r.scores) > r.fence
        since = np.where(past, np.where(since > 0, since, number), 0)
    return since


def _reason(row: Any, rank: int, count: int) -> str:  # noqa: ANN401
    place = f"score {row.score:.1f}, number {rank} of {count}"
    if row.decided_by == "user":
        return f"A person said {row.decision}; {place}."
    if row.decision == "reject":
        return f"Unusual, and in the way in which other images are; {place}."
    if row.decision == "review":
        return f"Unusual, but not clearly a defect: have a look; {place}."
    return f"Kept; {place}."


def _to_show(table: pd.DataFrame) -> np.ndarray:
    """Rows with evidence, worst first: whatever a rule says, there is something to look at."""
    first = table.decision.ne("keep").to_numpy()
    order = np.lexsort((-table.score.to_numpy(), ~first))
    return order[: max(_SHOWN, min(int(first.sum()), _MOST_SHOWN))]


def _unreadable(names: list[str], reasons: list[str]) -> pd.DataFrame:
    return pd.DataFrame({
        "image_path": names,
        "decision": "reject",
        "decided_by": "unreadable",
        "round": 0,
        "reason": [f"It can't be used: {reason}." for reason in reasons],
    })  # fmt: skip
