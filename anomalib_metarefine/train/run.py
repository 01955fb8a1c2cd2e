"""The steps of a run, one after the other, each written down in ``train.json`` when its result is complete.

Called again with the same settings, a run goes on where it stopped. Nothing of a finished step is done twice, and
nothing is mixed: other settings, other images and other decisions are refused.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_metarefine.curation.manifest import Manifest
from anomalib_metarefine.curation.run_folder import locked
from anomalib_metarefine.images.answers import load
from anomalib_metarefine.images.hashes import data_sha256, file_sha256
from anomalib_metarefine.images.sources import absolute, listing, read_source
from anomalib_metarefine.images.tables import read_table, table_text
from anomalib_metarefine.logs import quiet
from anomalib_metarefine.settings import setting_names
from anomalib_metarefine.train.plan import OURS, Plan, Step
from anomalib_metarefine.train.report import page
from anomalib_metarefine.train.use import rejected_before, use_of_images

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from anomalib.models import AnomalibModule

logger = logging.getLogger(__name__)

STATE_FILE, IMAGES_FILE, REPORT_FILE = "train.json", "images.csv", "report.md"
CURATION, TRAINED, CALIBRATED, EXPORTED = "curation", "trained.ckpt", "model.ckpt", "weights/openvino"
_VERIFIED_ON, _TIMED = 500, 100  # images at most, inferences
_CHATTY = ("anomalib", "lightning", "lightning.pytorch", "lightning_fabric", "timm")


class Run:
    """A run in its folder.

    Args:
        out (str | Path): A folder of its own; made if it does not exist.
        plan (Plan): What to do.
        say (Callable[[str], None]): Told what begins, and what is there already.
        progress (bool): Show bars.

    Raises:
        ValueError: If the folder holds a run of another plan, or something else.
    """

    def __init__(
        self, out: str | Path, plan: Plan, say: Callable[[str], None] = logger.info, progress: bool = True
    ) -> None:
        self.out, self.plan, self._say, self._progress = absolute(out), plan, say, progress
        self.steps: dict[str, Step] = {}
        file = self.out / STATE_FILE
        if not file.is_file():
            found = self.out.iterdir() if self.out.is_dir() else []
            others = [file.name for file in found if not file.name.startswith(".")]
            if others:
                msg = f"{self.out} holds {listing(sorted(others))} and no {STATE_FILE}. Pass a new or an empty folder."
                raise ValueError(msg)
            return
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            before, steps = state["plan"], {name: Step(**step) for name, step in state["steps"].items()}
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{file} is damaged ({error!r}). Pass a new folder."
            raise ValueError(msg) from error
        now = json.loads(json.dumps(asdict(plan)))
        for name, value in now.items():
            if before.get(name) != value:
                msg = f"{self.out} was begun with {name} = {before.get(name)!r}, and this call has {value!r}. "
                raise ValueError(msg + "Call it as before to go on, or pass a new folder.")
        self.steps = steps

    def go(self) -> dict[str, Step]:
        """Do what is not done yet, and write the report.

        Returns:
            dict[str, Step]: By name, in order.

        Raises:
            ValueError: If images, decisions or files have changed since a step was done with them, or one can't be
                done.
        """
        with locked(self.out):
            self._remember()
            if load(self._curation):  # a person's answers since the manifest was written
                from anomalib_metarefine.curation.review.finish import finish

                finish(self._curation)
            if "train" not in self.steps:  # what can't be built is told before the minutes of curation
                self._model((256, 256))
            self._step("curate", self._curate)
            self._require_same_images()
            decided = data_sha256(self.manifest.table.sha256, self.manifest.table.decision)
            self._step("train", self._train, self.out / TRAINED, decided)
            self._step("calibrate", self._calibrate, self.out / CALIBRATED)
            self._step("export", self._export, self.out / EXPORTED / "model.xml")
            self._step("verify", self._verify)
            self._write(REPORT_FILE, page(self.plan, self.steps, str(self._curation)))
        return self.steps

    @cached_property
    def manifest(self) -> Manifest:
        """Of the curation."""
        return Manifest.read(self._curation)

    @property
    def passed(self) -> bool:
        """Whether verification found no problem."""
        return not self.steps["verify"].figures["problems"]

    def _remember(self) -> None:
        steps = {name: asdict(step) for name, step in self.steps.items()}
        self._write(STATE_FILE, json.dumps({"plan": asdict(self.plan), "steps": steps}, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        """A file of the output folder, whole or not at all."""
        part = self.out / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.out / name)

    def _step(self, name: str, work: Callable[[], dict[str, Any]], file: Path | None = None, decided: str = "") -> None:
        """Do a step, unless it is done."""
        done = self.steps.get(name)
        if done and done.decided != decided:
            msg = (
                f"Decisions in {self._curation} have changed since {self.out} was trained by them. To train by the new "
                f"ones, pass a new folder, and --curation {self._curation}."
            )
            raise ValueError(msg)
        if done and file and file_sha256(file) != done.sha256:
            msg = f"{file} is not the file that the step {name} left there. Bring it back, or pass a new folder."
            raise ValueError(msg)
        if done:
            self._say(f"{name}: done before")
            return
        self._say(name)
        begin = time.perf_counter()
        figures = work()
        seconds = time.perf_counter() - begin
        self.steps[name] = Step(figures, seconds, file_sha256(file) if file else "", decided)
        self._remember()

    @property
    def _curation(self) -> Path:
        return absolute(self.plan.curation) if self.plan.curation else self.out / CURATION

    def _curate(self) -> dict[str, Any]:
        plan = self.plan
        if plan.curation is None:
            from anomalib_metarefine.curation.curate import curate
            from anomalib_metarefine.curation.decisions import remember
            from anomalib_metarefine.images.answers import DECISIONS_FILE, read

            with locked(self._curation):
                curation = curate(
                    plan.data,
                    backbone=plan.backbone,
                    image_size=tuple(plan.image_size) if plan.image_size else None,
                    seed=plan.seed,
                    batch_size=plan.batch_size,
                    decisions=plan.decisions,
                    ignore=plan.ignore,
                    progress=self._progress,
                    **plan.settings,
                )
                if plan.decisions:
                    file = Path(plan.decisions)
                    answers = read(file / DECISIONS_FILE if file.is_dir() else file)
                    remember(self._curation, curation.manifest, answers)
                curation.write(self._curation)
        found = self.manifest
        return {"images": len(found.table), **found.counts, "verdict": found.verdict}

    def _require_same_images(self) -> None:
        """Refuse images that are not those of the curation."""
        if self.plan.data is not None:
            now = {str(path) for path in read_source(self.plan.data).paths}
            known = set(map(str, self.manifest.paths(self.manifest.table)))
            if now != known:
                new, gone = sorted(now - known), sorted(known - now)
                found = [f"{len(p)} {kind} ({listing(p)})" for kind, p in (("new", new), ("gone", gone)) if p]
                msg = f"{self.plan.data} has other images than the curation in {self._curation}: {', '.join(found)}. "
                raise ValueError(msg + "Pass a new folder, which curates anew.")
        self.manifest.require_unchanged()

    def _train(self) -> dict[str, Any]:
        from anomalib.callbacks.checkpoint import ModelCheckpoint
        from anomalib.engine import Engine
        from lightning import seed_everything

        from anomalib_metarefine.curation.datamodule import curated_datamodule
        from anomalib_metarefine.model.checkpoints import save_checkpoint
        from anomalib_metarefine.model.make import sets_itself_in_validation

        plan, images = self.plan, use_of_images(self.manifest, self.plan)
        self._write(IMAGES_FILE, table_text(images))
        learned = images[images.use == "train"]
        curated = self.manifest.run.get("settings", {})
        seed_everything(plan.seed, verbose=False)
        model, length = self._model(tuple(plan.image_size or curated.get("image_size") or (256, 256)), curated)
        validates = sets_itself_in_validation(model)
        datamodule = curated_datamodule(
            [Path(path) for path in learned.image_path],
            variants=learned.variant.tolist() if learned.variant.any() else None,
            name=self.manifest.root.name or CURATION,
            train_batch_size=plan.batch_size,
            num_workers=max(0, min(8, (os.cpu_count() or 1) - 1)),
            **({"val_split_mode": "from_train", "val_split_ratio": 0.1} if validates else {}),
        )
        with tempfile.TemporaryDirectory(prefix=".training-", dir=self.out) as folder, quiet(*_CHATTY):
            engine = Engine(
                default_root_dir=folder, logger=False, enable_model_summary=False, enable_progress_bar=self._progress,
                callbacks=[ModelCheckpoint(save_top_k=0)], limit_val_batches=1.0 if validates else 0, **length,
            )  # fmt: skip
            engine.fit(model, datamodule=datamodule)
            if not getattr(model, "training_images", None):
                model.training_images = dict(zip(learned.image_path, learned.sha256, strict=True))
                model.provenance = {"seed": plan.seed, "images": len(self.manifest.table), "kept": len(learned)}
            part = Path(folder) / TRAINED
            save_checkpoint(engine.trainer, model, part)
            part.replace(self.out / TRAINED)
        refinement = getattr(model, "refinement", None)
        regions = {} if refinement is None else {"left_out": refinement.unusual_patches}
        return {"images": len(learned), "held_out": len(images) - len(learned), **regions}

    def _model(
        self, image_size: tuple[int, int], curated: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[AnomalibModule, dict[str, int]]:
        """A fresh model, and what the Engine must know of the length of its training."""
        from anomalib_metarefine.model.make import length_of_training, make_model

        plan = self.plan
        if plan.model == OURS:
            from anomalib_metarefine import MetaRefine

            settings = {name: curated[name] for name in setting_names() if name in curated}
            settings |= {"rule": "count:0"}  # what curation has decided stands; regions of kept images may be left out
            settings |= {"backbone": plan.backbone, "image_size": image_size, "visualizer": False}
            settings |= {"ignore": plan.ignore or curated.get("ignore"), "bit_depth": curated.get("bit_depth")}
            return MetaRefine(**settings | plan.init_args), {}
        off = {"visualizer": False, "evaluator": False}
        model = make_model(plan.model, plan.init_args, plan.backbone, None, image_size, **off)
        return model, length_of_training(model, plan.max_epochs, None, "--max-epochs")

    def _calibrate(self) -> dict[str, Any]:
        from anomalib_metarefine.model.calibration import calibrate_checkpoint

        images = read_table(self.out / IMAGES_FILE)
        held = images.image_path[images.use == "calibrate"].tolist()
        ignore = self.plan.ignore or self.manifest.run.get("settings", {}).get("ignore")
        with suppress(FileNotFoundError):  # of a step that was interrupted
            (self.out / CALIBRATED).unlink()
        found, _ = calibrate_checkpoint(
            self.out / TRAINED,
            self.out / CALIBRATED,
            held or None,
            false_alarm_rate=self.plan.false_alarm_rate,
            ignore=None if self.plan.model == OURS else ignore,
            left_out=rejected_before(self.manifest, images) if held else 0,
        )
        names = ("threshold", "false_alarm_rate", "bound", "confidence", "images", "set_aside", "method")
        return {name: getattr(found, name) for name in names} | {"uncertain": found.uncertain.expected_share}

    def _export(self) -> dict[str, Any]:
        from anomalib_metarefine.model.checkpoints import load_checkpoint
        from anomalib_metarefine.model.export import export_model

        path = export_model(load_checkpoint(self.out / CALIBRATED), self.out)
        size = sum(file.stat().st_size for file in path.parent.glob("model.*"))
        return {"file": str(path.relative_to(self.out)), "precision": "FP32", "megabytes": size / 1e6}

    def _verify(self) -> dict[str, Any]:
        from anomalib_metarefine.model.evaluation import LabelledImages, read_labelled
        from anomalib_metarefine.model.verify import verify_deployment

        if self.plan.test:
            images = read_labelled(self.plan.test)
        else:
            readable = self.manifest.table[self.manifest.table.decided_by != "unreadable"]
            images = LabelledImages(self.manifest.paths(readable), np.zeros(len(readable), dtype=bool))
        part = slice(None, None, -(-len(images.paths) // _VERIFIED_ON))
        labels = None if images.anomalous is None else images.anomalous[part]
        found = verify_deployment(
            self.out / EXPORTED, self.out / CALIBRATED, images.paths[part], labels, _TIMED, say=self._say
        )
        figures = asdict(found)
        return figures if self.plan.test else {**figures, "detection": None, "auroc": None}
