"""The end of a review: manifest and report say what a person answered, and what to type to train on what is left."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_metarefine.curation.curate import Curation
from anomalib_metarefine.curation.decisions import decide, remember
from anomalib_metarefine.curation.evidence import Evidence
from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.review.session import Session
from anomalib_metarefine.curation.run_folder import EVIDENCE_FILE, locked, manifest_file, read_run
from anomalib_metarefine.images.answers import DECISIONS_FILE, load, taken_back

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

_WAIT_S = 10


def finish(folder: str | Path, decisions: pd.DataFrame | None = None) -> Manifest:
    """Bring ``manifest.csv`` and ``report.html`` up to date with ``decisions.csv``, and with further decisions.

    Both say from then on how many dirty images are left at most, as the review's audit has it.

    Args:
        folder (str | Path): Output folder of ``metarefine curate``.
        decisions (pd.DataFrame | None): Of a person, as `decisions.read` gives them; remembered in ``decisions.csv``.

    Returns:
        Manifest: As it is written now.

    Raises:
        FileNotFoundError: If the folder has no manifest.
        ValueError: If a decision can't be carried out; then nothing has changed.
    """
    folder = Path(folder)
    with locked(folder, _WAIT_S):
        manifest = Manifest.read(folder)
        changed = manifest if decisions is None else decide(manifest, decisions)
        if decisions is not None:
            remember(folder, manifest, decisions)
        table = changed.table
        back = (table.decided_by == "user") & table.sha256.isin(taken_back(folder))
        table.loc[back, ["decision", "decided_by", "reason"]] = "review", "rule", "A person took an answer back."
        answers = load(folder)
        here = table[table.sha256.isin(answers)]  # earlier answers may be about images that have gone
        finished = decide(changed, here.assign(decision=here.sha256.map(answers)).drop_duplicates("sha256"))
        state = Session(folder).standing()
        finished.run["review"] = {"looked": state.looked, "found": state.found, "at_most": state.at_most}
        before = Manifest.read(folder)
        if finished.table.equals(before.table) and finished.run == before.run:
            return finished
        if (folder / EVIDENCE_FILE).is_file():
            Curation(finished, Evidence.load(folder / EVIDENCE_FILE)).write(folder)
        else:
            finished.write(folder)
    return finished


def next_commands(folder: str | Path) -> list[str]:
    """What to type after a review: train on what is kept, or sort it into a folder; or update a line's model."""
    folder = Path(folder).resolve()
    results = read_run(manifest_file(folder)).get("results")
    if results:
        verdicts = ["--verdicts", str(folder / DECISIONS_FILE), "--results", results, "--out", "NEW.ckpt"]
        return [shlex.join(["metarefine", "update", "CKPT", *verdicts])]
    train = ["metarefine", "train", "--curation", str(folder), "--out", _beside(folder, "model")]
    sort = ["metarefine", "apply", str(folder), "--to", _beside(folder, "clean"), "--review", "keep"]
    return [shlex.join(train), shlex.join(sort)]


def _beside(folder: Path, name: str) -> str:
    """A folder that does not exist yet."""
    base = f"{folder.name.removesuffix('-curation')}-{name}"
    target, number = folder.with_name(base), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{base}-{number}")
    return str(target)


def anomalib_command(counts: Mapping[str, int], applied: Path) -> str:
    """What trains MetaRefine on the kept images of a folder that `apply` wrote, and tests on the rejected ones.

    Args:
        counts (Mapping[str, int]): Images by decision.
        applied (Path): The folder.
    """
    test = ["--data.abnormal_dir", "reject"] if counts["reject"] else ["--data.test_split_mode", "synthetic"]
    data = ["--data", "Folder", "--data.name", applied.name, "--data.root", str(applied), "--data.normal_dir", "keep"]
    return shlex.join(["anomalib", "train", "--model", "MetaRefine", *data, *test, "--data.val_split_mode", "none"])
