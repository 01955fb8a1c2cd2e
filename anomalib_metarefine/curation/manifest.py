"""The manifest: what was decided about every image of a training set, and a datamodule of the images that are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from anomalib_metarefine.images.sources import absolute, load_datamodule, read_table, set_up_without_validation, some

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from anomalib.data import AnomalibDataModule, Tabular

logger = logging.getLogger(__name__)

SCHEMA = "metarefine-manifest/1"
MANIFEST_FILE, RUN_FILE = "manifest.csv", "run.json"
DECISIONS = ("keep", "reject", "review")
DECIDED_BY = ("rule", "user", "unreadable")

_TEXT = ("image_path", "sha256", "decision", "decided_by", "reason", "quality")
_FIRST = ["image_path", "sha256", "decision", "decided_by", "round", "reason"]
_FIRST += ["score", "fence_distance", "q_value", "variant"]
_ROUND = re.compile(r"score_round_(\d+)")


class Changes(NamedTuple):
    """Files that are not what they were when the manifest was written.

    Attributes:
        missing (list[str]): ``image_path`` of the files that are gone.
        changed (list[str]): ``image_path`` of the files with other bytes, or that can't be read any more.
    """

    missing: list[str]
    changed: list[str]


@dataclass(repr=False, eq=False)
class Manifest:
    """One row per training image, and what was run.

    Args:
        table (pd.DataFrame): Columns ``image_path`` (relative to the root, with ``/``), ``sha256`` (empty if the file
            could not be read at all), ``decision`` (keep, reject, review), ``decided_by`` (rule, user, unreadable),
            ``round`` (in which a rejected image left for good; 0 for the others), ``reason``, ``score``,
            ``fence_distance``, ``q_value``, ``uncertainty``, ``score_<part>``, ``score_round_<k>``,
            ``quality``. Scores are in robust standard deviations of the kept images, the probability in [0, 1].
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

    def __post_init__(self) -> None:
        schema = self.run.get("schema", SCHEMA)
        if schema != SCHEMA:
            msg = f"The manifest has schema {schema!r}, but {SCHEMA!r} is expected. Install the version that wrote it."
            raise ValueError(msg)
        if not Path(self.run.get("root", "")).is_absolute():
            msg = f"run['root'] must be the absolute folder of the images, found {self.run.get('root')!r}."
            raise ValueError(msg)
        self.run = {"schema": SCHEMA, **self.run}
        self.table = _checked(self.table)

    @classmethod
    def read(cls, path: str | Path, root: str | Path | None = None) -> Manifest:
        """Read what `write` wrote.

        Args:
            path (str | Path): ``manifest.csv`` or its folder; ``run.json`` lies beside it.
            root (str | Path | None): Where the images lie now, if not where they lay when the manifest was written.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If one of the two files is damaged.
        """
        file = Path(path) / MANIFEST_FILE if Path(path).is_dir() else Path(path)
        run_file = file.with_name(RUN_FILE)
        for required in (file, run_file):
            if not required.is_file():
                msg = f"There is no {required}. Expected {MANIFEST_FILE} and {RUN_FILE} of `metarefine curate`."
                raise FileNotFoundError(msg)
        try:
            run = json.loads(run_file.read_text(encoding="utf-8"))
        except ValueError as error:
            msg = f"{run_file} is no valid JSON ({error}). Run `metarefine curate` again."
            raise ValueError(msg) from error
        if root is not None:
            run["root"] = str(absolute(root))
        try:
            return cls(read_table(file), run)
        except ValueError as error:
            msg = f"{file} can't be used: {error}"
            raise ValueError(msg) from error

    def write(self, folder: str | Path) -> Path:
        """Write ``manifest.csv`` and ``run.json``; a file that is there is replaced in one step, never half written.

        Args:
            folder (str | Path): Made if it does not exist.

        Returns:
            Path: The ``manifest.csv``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run = json.dumps({**self.run, "counts": self.counts}, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(folder / MANIFEST_FILE, self.table.to_csv(index=False))
        write_text(folder / RUN_FILE, run + "\n")
        return folder / MANIFEST_FILE

    @property
    def root(self) -> Path:
        """Folder that ``image_path`` is relative to."""
        return Path(self.run["root"])

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

    @property
    def review(self) -> list[Path]:
        """Images for a person to look at, most uncertain first."""
        return self.paths(self.rows("review"))

    def rows(self, decision: str) -> pd.DataFrame:
        """Rows of one decision: kept by path, rejected worst first, review most uncertain first.

        Most uncertain is a dirty probability nearest to one half; among equals, the larger spread of the score.
        """
        rows = self.table[self.table.decision == decision]
        if decision == "reject":
            return rows.sort_values("score", ascending=False, kind="stable", na_position="last")
        if decision == "review":
            margin = (rows.q_value - 0.5).abs().fillna(0)
            order = pd.DataFrame({"margin": margin, "spread": -rows.uncertainty}).sort_values(["margin", "spread"])
            return rows.loc[order.index]
        return rows

    def paths(self, rows: pd.DataFrame) -> list[Path]:
        """Absolute paths of rows of the table."""
        return [self.root / path for path in rows.image_path]

    @property
    def verdict(self) -> str:
        """What came out, in a sentence or two."""
        rejected, review, total = self.counts["reject"], self.counts["review"], len(self.table)
        share = f" ({_percent(rejected / total)})" if total else ""
        text = f"{rejected} of {total} images{share} {'was' if rejected == 1 else 'were'} rejected, "
        text += f"{review} {'needs' if review == 1 else 'need'} your eyes."
        estimate = self.run.get("contamination")
        if estimate:
            low, high = (_percent(estimate[end]).removesuffix(" %") for end in ("low", "high"))
            answers = estimate.get("answers", 0)
            told = f", with your {answers} answer{'s' * (answers != 1)}" if answers else ""
            text += f" Estimated share of dirty images{told}: {_percent(estimate['estimate'])} "
            text += f"({_percent(estimate['level'])} interval {low} to {high} %)."
            if not estimate.get("visible_split", True):
                text += " The scores show no visible split between clean and dirty images."
        return text

    def __repr__(self) -> str:
        return f"<Manifest of {self.root}: {self.verdict}>"

    def verify(self, decisions: Collection[str] = DECISIONS) -> Changes:
        """Read every file again and compare its hash; size and time of a file are no proof.

        Args:
            decisions (Collection[str]): Only images with one of these decisions.
        """
        rows = self.table[self.table.decision.isin(list(decisions))]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            now = list(pool.map(file_sha256, self.paths(rows)))
        different = rows.image_path[(rows.sha256 != np.array(now, dtype=object)).to_numpy()].tolist()
        missing = [path for path in different if not (self.root / path).exists()]
        return Changes(missing, sorted(set(different) - set(missing)))

    def require_unchanged(self, decisions: Collection[str] = DECISIONS) -> None:
        """Raise a ``ValueError`` that names the files that `verify` finds missing or changed."""
        missing, changed = self.verify(decisions)
        if missing or changed:
            kinds = {"missing": missing, "changed": changed}
            found = [f"{len(paths)} {kind} ({some(paths)})" for kind, paths in kinds.items() if paths]
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
        from anomalib.data import Tabular

        if review not in ("keep", "reject"):
            msg = f"review must be 'keep' or 'reject', found {review!r}."
            raise ValueError(msg)
        used = ["keep", "review"] if review == "keep" else ["keep"]
        rows = self.table[self.table.decision.isin(used)]
        if rows.empty:
            msg = f"There is nothing to train on: {self.counts} with review={review!r}."
            raise ValueError(msg)
        self.require_unchanged(used)
        images = self.paths(rows) if repaired is None else _copies(rows, Path(repaired))
        samples = _samples(images, split="train")
        found: dict[str, Any] = {"test_split_mode": "none", "val_split_mode": "none"}
        if test is not None:
            held_out, found = _test_samples(load_datamodule(test) if isinstance(test, str | Path) else test)
            both = set(samples.image_path) & set(held_out.image_path)
            if both:
                logger.warning("%d test images are training images too: %s.", len(both), some(sorted(both)))
            samples = pd.concat([samples, held_out], ignore_index=True)
        return Tabular(**{"name": self.root.name or "curated", "samples": samples, **found, **settings})

    def diff(self, other: Manifest) -> pd.DataFrame:
        """What is different in a later manifest.

        An image is found again by its content, and where that is new, by its path: a file that was moved or renamed is
        neither added nor removed.

        Args:
            other (Manifest): The later one.

        Returns:
            pd.DataFrame: One row per image with another decision, added or removed, by path: ``change`` (decision,
                added, removed), ``image_path``, ``image_path_before``, ``decision_before``, ``decision``, ``reason``
                (the later one's); empty where there is none.
        """
        before, after = (m.table[["image_path", "sha256", "decision", "reason"]] for m in (self, other))
        matches = _match(before, after)
        old, new = [pair[0] for pair in matches], [pair[1] for pair in matches]
        old_rows = before.loc[old].reset_index(drop=True).add_suffix("_before")
        same = old_rows.join(after.loc[new].reset_index(drop=True))
        removed = before.drop(index=old)
        changes = [
            same[same.decision != same.decision_before].assign(change="decision"),
            removed.add_suffix("_before").assign(change="removed", image_path=removed.image_path),
            after.drop(index=new).assign(change="added"),
        ]
        columns = ["change", "image_path", "image_path_before", "decision_before", "decision", "reason"]
        table = pd.concat(changes).reindex(columns=columns).fillna("")
        return table.sort_values("image_path", ignore_index=True)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hex; empty if it can't be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def data_sha256(image_paths: Iterable[str], hashes: Iterable[str]) -> str:
    """One hash of a whole data set: over the sorted lines ``<image_path> <sha256>``, whatever the order given."""
    lines = sorted(f"{path} {sha256}\n" for path, sha256 in zip(image_paths, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there in one step, so that no reader sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _checked(table: pd.DataFrame) -> pd.DataFrame:
    """A copy with the columns in order and of the right types."""
    missing = [column for column in [*_FIRST, "quality"] if column not in table]
    if missing:
        msg = f"a manifest needs the columns {missing}; found {list(table.columns)}."
        raise ValueError(msg)
    rounds = sorted((c for c in table if _ROUND.fullmatch(c)), key=lambda c: int(_ROUND.fullmatch(c)[1]))
    parts = [c for c in table if c.startswith("score_") and c not in rounds]
    ordered = [*_FIRST, *parts, *rounds, "quality"]
    table = table[[*ordered, *(c for c in table if c not in ordered)]].copy()
    for column in ordered:
        table[column] = _typed(table[column])
    for column, allowed in [("decision", DECISIONS), ("decided_by", DECIDED_BY)]:
        strange = sorted(set(table[column]) - set(allowed))
        if strange:
            msg = f"{column} must be one of {list(allowed)}; found {some(strange)}."
            raise ValueError(msg)
    repeated = table.image_path[table.image_path.duplicated()].tolist()
    if repeated:
        msg = f"{len(repeated)} images are listed more than once: {some(repeated)}."
        raise ValueError(msg)
    # Paths are joined to folders that `apply` writes into: none may lead out of them.
    outside = [p for p in table.image_path if not p or PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts]
    if outside:
        msg = f"image_path must be relative to the root and inside of it; found {some(outside)}."
        raise ValueError(msg)
    if not table.q_value.dropna().between(0, 1).all():
        msg = "q_value must lie in [0, 1]; "
        raise ValueError(msg + f"found {table.q_value.min():g} to {table.q_value.max():g}.")
    return table.sort_values("image_path", ignore_index=True)


def _typed(column: pd.Series) -> pd.Series:
    if column.name in _TEXT:
        return column.fillna("").astype(str)
    try:
        # Text comes from a file. Python's float, unlike pandas' fast parser, gives back the very number written.
        numbers = pd.Series([float("nan") if value in ("", None) else float(value) for value in column], column.index)
    except (TypeError, ValueError) as error:
        msg = f"{column.name} must be a number ({error})."
        raise ValueError(msg) from error
    if column.name != "round":
        return numbers
    if not (numbers % 1 == 0).all():
        msg = f"round must be a whole number, found {some(numbers[numbers % 1 != 0].tolist())}."
        raise ValueError(msg)
    return numbers.astype(int)


def _match(before: pd.DataFrame, after: pd.DataFrame) -> list[tuple[int, int]]:
    """Index pairs of the rows of the same image: same content and path, else same content, else same path."""
    matches: list[tuple[int, int]] = []
    for keys in (["sha256", "image_path"], ["sha256", "copy"], ["image_path"]):
        left, right = (
            table.drop(index=[pair[side] for pair in matches]).rename_axis("row").reset_index()
            for side, table in enumerate((before, after))
        )
        for table in (left, right):
            table["copy"] = table.groupby("sha256").cumcount()  # exact duplicates pair off one by one
        if "copy" in keys:
            left, right = left[left.sha256 != ""], right[right.sha256 != ""]
        joined = left.merge(right, on=keys)
        matches += list(zip(joined.row_x.tolist(), joined.row_y.tolist(), strict=True))
    return matches


def _copies(rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Where `apply` put the images; those for review may lie with the kept ones."""
    found = []
    for row in rows.itertuples():
        own, with_kept = (folder / name / row.image_path for name in (row.decision, "keep"))
        found.append(own if own.exists() else with_kept)
    missing = [str(path) for path in found if not path.exists()]
    if missing:
        msg = f"{len(missing)} of {len(found)} images are not in {folder}: {some(missing)}. "
        raise FileNotFoundError(msg + "Expected what `apply` wrote with mode 'repair' or 'copy' from this manifest.")
    return found


def _samples(paths: Iterable[Path | str], split: str, label: object = 0, mask: object = "") -> pd.DataFrame:
    """Rows as `anomalib.data.Tabular` takes them; label 0 is normal."""
    listed = [str(absolute(path)) for path in paths]
    return pd.DataFrame({"image_path": listed, "label_index": label, "mask_path": mask, "split": split})


def _test_samples(datamodule: AnomalibDataModule) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The test rows of a datamodule, and its settings that a Tabular has too."""
    from anomalib.data.utils import TestSplitMode, ValSplitMode

    if datamodule.test_split_mode == TestSplitMode.SYNTHETIC:
        msg = (
            f"The test set of {datamodule.name} is synthetic and vanishes with it. Pass one with test images in files."
        )
        raise ValueError(msg)
    source = set_up_without_validation(datamodule).test_data
    masks = source.samples.get("mask_path", pd.Series("", source.samples.index)).fillna("").astype(str)
    samples = _samples(source.samples.image_path, "test", source.samples.label_index.to_numpy(), masks.to_numpy())
    shared = ["train_batch_size", "eval_batch_size", "num_workers", "val_split_mode", "val_split_ratio", "seed"]
    shared += ["train_augmentations", "val_augmentations", "test_augmentations"]
    settings = {name: getattr(datamodule, name) for name in shared}
    if settings["val_split_mode"] == ValSplitMode.FROM_DIR:
        logger.warning("%s has a validation folder; the curated datamodule validates on the test set.", datamodule.name)
        settings["val_split_mode"] = ValSplitMode.SAME_AS_TEST
    # Where no normal test image is left, FROM_DIR would take some out of the training set.
    settings["test_split_mode"] = TestSplitMode.FROM_DIR if source.has_normal else TestSplitMode.NONE
    return samples, settings


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
