"""The manifest: what was decided about every image of a training set."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from anomalib_metarefine.curation.datamodule import copies, curated_datamodule
from anomalib_metarefine.curation.run_folder import (
    MANIFEST_FILE,
    PARQUET_FILE,
    RUN_FILE,
    manifest_file,
    read_run,
    write_together,
)
from anomalib_metarefine.curation.schema import DECISIONS, SCHEMA, check_run, checked_table
from anomalib_metarefine.images.hashes import file_sha256
from anomalib_metarefine.images.sources import absolute, listing
from anomalib_metarefine.images.storage import is_remote, located
from anomalib_metarefine.images.tables import read_table, table_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from anomalib.data import AnomalibDataModule, Tabular

    from anomalib_metarefine.curation.review.serving import Review

_FIRST_LOOK = 40  # images
_SECONDS_A_LOOK = 2
_CHUNK = 10_000  # rows at a time, where all would take much memory


class Changes(NamedTuple):
    """Files that are not what they were when the manifest was written."""

    missing: list[str]  # image_path of the files that are gone
    changed: list[str]  # image_path of the files with other bytes, or that can't be read any more


@dataclass(repr=False, eq=False)
class Manifest:
    """One row per training image, and what was run.

    Args:
        table (pd.DataFrame): Columns ``image_path`` (relative to the root, with ``/``), ``sha256`` (empty if the file
            could not be read at all), ``decision`` (keep, reject, review), ``decided_by`` (rule, user, unreadable),
            ``round`` (in which a rejected image left for good; 0 for the others), ``reason``, ``score``,
            ``fence_distance``, ``q_value``, ``variant``, ``score_<part>``, ``score_round_<k>``,
            ``quality``. Scores are in robust standard deviations of the kept images, ``q_value`` in [0, 1].
            Further columns are kept as they are. Stored as a copy, sorted by ``image_path``, columns in this order.
        run (dict[str, Any]): What was run. ``root``, the absolute folder that ``image_path`` is relative to, is a must.

    Raises:
        ValueError: If columns are missing or a value is none of those above.

    Example:
        >>> manifest = Manifest.read("curation")  # doctest: +SKIP
        >>> Engine().train(model=Padim(), datamodule=manifest.datamodule(test=my_datamodule))  # doctest: +SKIP
    """

    table: pd.DataFrame
    run: dict[str, Any]
    _folder: Path | None = field(default=None, init=False)  # where it was last read from or written to

    def __post_init__(self) -> None:
        check_run(self.run)
        self.run = {"schema": SCHEMA, **self.run}
        self.table = checked_table(self.table)

    @classmethod
    def read(cls, path: str | Path, root: str | Path | None = None) -> Manifest:
        """Read what `write` wrote.

        Args:
            path (str | Path): ``manifest.csv`` or ``manifest.parquet``, or its folder; ``run.json`` lies beside it.
            root (str | Path | None): Where the images lie now, if not where they lay when the manifest was written.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If one of the two files is damaged, or they are not of one run.
        """
        file = located(path)
        file = manifest_file(file) if file.is_dir() else file
        run = read_run(file)
        if root is not None:
            run["root"] = str(absolute(root))
        try:
            manifest = cls(read_table(file), run)
        except ValueError as error:
            msg = f"{file} and {RUN_FILE} beside it can't be used: {error}"
            raise ValueError(msg) from error
        manifest._folder = file.parent
        return manifest

    def write(
        self,
        folder: str | Path,
        others: Mapping[str, Callable[[Path], object]] | None = None,
        parquet: bool | None = None,
    ) -> Path:
        """Write ``manifest.csv`` and ``run.json``, and what else belongs to the run: all files in one step, or none.

        Args:
            folder (str | Path): Made if it does not exist.
            others (Mapping[str, Callable] | None): What writes each further file of the run, at the path it is given.
            parquet (bool | None): ``manifest.parquet`` in place of ``manifest.csv``, for a million rows; needs pyarrow.
                ``None`` writes the kind that was read, or else CSV.

        Returns:
            Path: The manifest.
        """
        if PARQUET_FILE in self.run.get("files", {}) if parquet is None else parquet:
            name, write = PARQUET_FILE, self._write_parquet
        else:
            name, write = MANIFEST_FILE, self._write_csv
        write_together(folder, {**self.run, "counts": self.counts}, {name: write, **(others or {})})
        self._folder = located(folder)
        return self._folder / name

    def _write_parquet(self, path: Path) -> None:
        self.table.to_parquet(path, index=False)

    def _write_csv(self, path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            for start in range(0, len(self.table), _CHUNK):
                file.write(table_text(self.table[start : start + _CHUNK], header=start == 0))

    @cached_property
    def root(self) -> Path:
        """Folder that ``image_path`` is relative to."""
        return located(self.run["root"])

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by decision."""
        return {decision: int((self.table.decision == decision).sum()) for decision in DECISIONS}

    @property
    def kept(self) -> list[Path]:
        """Images to keep, by path."""
        return self.paths(self.rows("keep"))

    @property
    def rejected(self) -> list[Path]:
        """Rejected images, worst first; unreadable ones last."""
        return self.paths(self.rows("reject"))

    def rows(self, decision: str) -> pd.DataFrame:
        """Rows of one decision: kept by path, the others worst first."""
        rows = self.table[self.table.decision == decision]
        if decision == "keep":
            return rows
        return rows.sort_values("score", ascending=False, kind="stable", na_position="last")

    def paths(self, rows: pd.DataFrame) -> list[Path]:
        """Absolute paths of rows of the table."""
        return [self.root / path for path in rows.image_path]

    @property
    def headline(self) -> str:
        """What came out, in a sentence."""
        rejected, review, total = self.counts["reject"], self.counts["review"], len(self.table)
        text = f"{rejected} of {total} images ({_percent(rejected / total)}) {'was' if rejected == 1 else 'were'} "
        doubtful = f", and {review} more {'is' if review == 1 else 'are'} doubtful" if review else ""
        return f"{text}rejected{doubtful}."

    @property
    def verdict(self) -> str:
        """The headline, what kind of folder it is, and what to do next."""
        looked = self.table.decided_by == "user"
        if looked.any():
            dirty = int((looked & (self.table.decision == "reject")).sum())
            text = f"A person has looked at {looked.sum()}, and found {dirty} dirty."
            if "review" in self.run:
                text += f" Among the others at most {self.run['review']['at_most']} are dirty (95 %)."
        else:
            first = min(len(self.table), max(_FIRST_LOOK, self.counts["reject"] + self.counts["review"]))
            minutes = max(1, round(first * _SECONDS_A_LOOK / 60))
            text = f"Look at the {first} highest scores first: about {minutes} minute{'s' * (minutes != 1)}. "
            text += "How many dirty images there are can't be said before somebody has looked."
        return " ".join(filter(None, (self.headline, self.run.get("structure", {}).get("text", ""), text)))

    def __repr__(self) -> str:
        return f"<Manifest of {self.root}: {self.verdict}>"

    def verify(self, decisions: Collection[str] = DECISIONS) -> Changes:
        """Read every file again and compare its hash; size and time of a file are no proof.

        Args:
            decisions (Collection[str]): Only images with one of these decisions.
        """
        rows = self.table[self.table.decision.isin(list(decisions))]
        now: list[str] = []
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(rows), _CHUNK):
                now += pool.map(file_sha256, self.paths(rows[start : start + _CHUNK]))
        different = rows.image_path[(rows.sha256 != np.array(now, dtype=object)).to_numpy()].tolist()
        missing = [path for path in different if not (self.root / path).exists()]
        return Changes(missing, sorted(set(different) - set(missing)))

    def require_unchanged(self, decisions: Collection[str] = DECISIONS) -> None:
        """Raise a ``ValueError`` that names the files that `verify` finds missing or changed."""
        missing, changed = self.verify(decisions)
        if missing or changed:
            kinds = {"missing": missing, "changed": changed}
            found = [f"{len(paths)} {kind} ({listing(paths)})" for kind, paths in kinds.items() if paths]
            msg = f"Images under {self.root} are not what they were when the manifest was written: {', '.join(found)}. "
            raise ValueError(msg + "Run `metarefine curate` again, or say where the images are now with `root`.")

    def datamodule(
        self,
        test: AnomalibDataModule | str | Path | None = None,
        review: Literal["keep", "reject"] = "keep",
        repaired: str | Path | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> Tabular:
        """A stock anomalib datamodule whose training set is the kept part, for any anomalib model.

        Without a test set there is nothing to validate on either: train with ``Engine(limit_val_batches=0)``.

        Args:
            test (AnomalibDataModule | str | Path | None): Whose test set to use, with its labels and masks, or the YAML
                file of one. Batch sizes, workers, augmentations, seed and the way to a validation set are taken from it
                too. It is not changed.
            review (Literal["keep", "reject"]): Whether images for review are trained on.
            repaired (str | Path | None): Folder that `apply` wrote; training images are taken from there.
            **settings (Any): Settings of `anomalib.data.Tabular`; they win.

        Returns:
            Tabular: With validation set as ``test`` has it; one read from a folder of its own, which Tabular can't
                express, becomes ``same_as_test``.

        Raises:
            ValueError: If nothing is kept, if files have changed since the manifest was written, or if the test set is
                synthetic.
            FileNotFoundError: If ``repaired`` has not all the images.
        """
        if review not in ("keep", "reject"):
            msg = f"review must be 'keep' or 'reject', found {review!r}."
            raise ValueError(msg)
        used = ["keep", "review"] if review == "keep" else ["keep"]
        rows = self.table[self.table.decision.isin(used)]
        if rows.empty:
            msg = f"There is nothing to train on: {self.counts} with review={review!r}."
            raise ValueError(msg)
        if is_remote(self.root):
            msg = f"anomalib reads images of this machine only, not {self.root}. Run `metarefine apply --mode copy` "
            raise ValueError(msg + "and train on its folder.")
        self.require_unchanged(used)
        images = self.paths(rows) if repaired is None else copies(rows, Path(repaired))
        return curated_datamodule(images, test, **{"name": self.root.name or "curated", **settings})

    def review(self, by: str = "") -> Review:
        """Open the review page inside a notebook; the notebook goes on meanwhile.

        It serves what was read or written last, and ends with the notebook or by ``stop()`` of what it returns. Browser
        and notebook must run on this machine.

        Args:
            by (str): Who answers, for the record; the user's name if not given.

        Raises:
            ValueError: If the manifest lies in no folder yet.
            ModuleNotFoundError: If the extra ``review`` is not installed.

        Example:
            >>> Manifest.read("line7-curation").review()  # doctest: +SKIP
            <Review of 300 images at http://127.0.0.1:40123/…/>
        """
        if self._folder is None:
            msg = "The manifest lies in no folder yet, and answers need one. Write it first: curation.write(DIR)."
            raise ValueError(msg)
        try:
            from anomalib_metarefine.curation.review.serving import review
        except ModuleNotFoundError as error:
            msg = f"The review page needs {error.name}: pip install 'anomalib-metarefine[review]'."
            raise ModuleNotFoundError(msg, name=error.name) from error
        return review(self._folder, by)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
