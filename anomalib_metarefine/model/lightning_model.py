"""MetaRefine, the anomalib model.

References:
    Aqeel et al., "Meta Learning-Driven Iterative Refinement for Robust Anomaly Detection in Industrial Inspection",
    arXiv 2503.01569.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import AUROC
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_metarefine.features.backbone import fitting_size, normalization
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.features.resize import ExactPreProcessor
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.images.answers import load
from anomalib_metarefine.images.reading import check_bit_depth, check_images
from anomalib_metarefine.images.regions import as_text, read_regions
from anomalib_metarefine.logs import log_once
from anomalib_metarefine.meta.maml import get_learner
from anomalib_metarefine.model.calibration import calibrate_model
from anomalib_metarefine.model.checkpoints import KEY, additions, check_format
from anomalib_metarefine.model.explain import Explanation, explain
from anomalib_metarefine.model.export import VerifiableExport, data_hashes
from anomalib_metarefine.model.initialisation import SharedInitialisation
from anomalib_metarefine.model.memory import Memory
from anomalib_metarefine.model.torch_model import MetaRefineModel
from anomalib_metarefine.model.training_images import (
    TrainingImages,
    answers_about,
    give_resize_to,
    warn_if_squashed,
)
from anomalib_metarefine.model.update import update
from anomalib_metarefine.progress import progress_bars
from anomalib_metarefine.refinement.engine import refine_images
from anomalib_metarefine.refinement.rounds import Refinement
from anomalib_metarefine.settings import Settings, setting_names, settings_docstring

if TYPE_CHECKING:
    from anomalib_metarefine.model.outcome import Update
    from anomalib_metarefine.refinement.engine import Result

logger = logging.getLogger(__name__)

_DEFAULTS = Settings()


class MetaRefine(VerifiableExport, MemoryBankMixin, AnomalibModule):
    """Anomaly detection from a dirty training set.

    One pass over the training images collects features of a frozen backbone. By default a normalizing flow over
    whitened patches is meta-trained on episodes with deliberately dirtied support sets. Then rounds of refinement adapt
    the flow to the kept images, add its likelihood to the distance to the nearest other images, and reject those past a
    fence that are like other suspicious ones. The density of what is kept is the model; the decision about every image
    is in the checkpoint (`refinement`).

    Args:
        backbone (str): Any timm architecture.
        layers (Sequence[str] | None): Modules of the backbone to read; ``None`` takes strides 8 and 16.
        pre_trained (bool): Load pretrained weights.
        image_size (tuple[int, int] | None): Height and width that images are resized to; ``None`` takes the shape of
            most training images, at the area of 256 x 256 pixels (of a datamodule; dataloaders alone get 256 x 256).
        {settings}
        bit_depth (int | None): Bits in use of the line's files with more than 8, such as 12; it goes into exported
            models. Training images of such files are those of `metarefine convert` with the same bit depth.
        init_from (str | Path | None): File of `metarefine meta-train` to start from, instead of meta-training here.
        decisions (str | Path | None): Output folder of `metarefine curate` or its ``decisions.csv``: what a person
            decided about training images holds against the rule, and guides refinement. Images are known by content.
        ignore (str | Path | None): File of regions that are not looked at, in no image: a picture, black there, or
            polygons (`read_regions`). They lie in the whole image, which the ``pre_processor`` must not crop.
        memory_limit_mb (float): Past it, features go to files in a temporary folder.
        remember_mb (float): Megabytes of features that the checkpoint may hold, so that the model can be updated
            without the images (``update``); 0 leaves them out. ``print(model)`` tells how many it holds.
        pre_processor (nn.Module | bool): See anomalib. The default resizes to ``image_size`` and normalises as the
            backbone was trained.
        post_processor (nn.Module | bool): See anomalib.
        evaluator (Evaluator | bool): See anomalib.
        visualizer (Visualizer | bool): See anomalib.

    Raises:
        ValueError: If a setting is out of range or names something that does not exist.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> model = MetaRefine()
        >>> Engine().train(model=model, datamodule=MVTecAD(category="screw"))  # doctest: +SKIP
        >>> model.refinement.rejected  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        image_size: tuple[int, int] | None = None,
        dimensions: int = _DEFAULTS.dimensions,
        blocks: int = _DEFAULTS.blocks,
        hidden: int = _DEFAULTS.hidden,
        shrinkage: float = _DEFAULTS.shrinkage,
        tail: float = _DEFAULTS.tail,
        trim: float = _DEFAULTS.trim,
        adaptation_steps: int = _DEFAULTS.adaptation_steps,
        batch_patches: int = _DEFAULTS.batch_patches,
        meta_algorithm: Literal["maml", "fomaml", "pretraining"] = _DEFAULTS.meta_algorithm,
        meta_backend: Literal["torch", "learn2learn"] = _DEFAULTS.meta_backend,
        meta_steps: int = _DEFAULTS.meta_steps,
        episodes: int = _DEFAULTS.episodes,
        support_images: int = _DEFAULTS.support_images,
        inner_steps: int = _DEFAULTS.inner_steps,
        inner_lr: float = _DEFAULTS.inner_lr,
        meta_lr: float = _DEFAULTS.meta_lr,
        likelihood_weight: float = _DEFAULTS.likelihood_weight,
        neighbour_weight: float = _DEFAULTS.neighbour_weight,
        neighbour_tail: float = _DEFAULTS.neighbour_tail,
        neighbour_window: int = _DEFAULTS.neighbour_window,
        references: int = _DEFAULTS.references,
        likeness_weight: float = _DEFAULTS.likeness_weight,
        structure: Literal["auto", "aligned", "anywhere", "unlike"] = _DEFAULTS.structure,
        variants: Literal["auto", "off", "folders", "column"] = _DEFAULTS.variants,
        rule: str = _DEFAULTS.rule,
        rounds: int = _DEFAULTS.rounds,
        patch_fence: float = _DEFAULTS.patch_fence,
        bit_depth: int | None = None,
        init_from: str | Path | None = None,
        decisions: str | Path | None = None,
        ignore: str | Path | None = None,
        memory_limit_mb: float = 2048,
        remember_mb: float = 256,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        chosen = locals()
        settings = Settings(**{name: chosen[name] for name in setting_names()})
        check_bit_depth(bit_depth)
        log_once()
        size_follows = pre_processor is True and image_size is None
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size, backbone)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model: MetaRefineModel = MetaRefineModel(
            backbone, layers, pre_trained, settings.dimensions, settings.blocks, settings.hidden, settings.tail
        )
        self.settings, self.bit_depth = settings, bit_depth
        self.size_follows_images = size_follows  # once training begins
        self._backbone, self._init_from = backbone, init_from
        self._decisions, self._decided = decisions, {}
        self._ignore = ignore
        self._shared: SharedInitialisation | None = None
        self.refinement: Refinement | None = None
        self.calibration: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}
        self.memory: Memory | None = None
        self._memory_limit_mb, self._remember_mb = memory_limit_mb, remember_mb
        self._store = FeatureStore(memory_limit_mb)
        self._grid: tuple[int, int] | None = None
        self.training_images: dict[str, str] = {}
        self.left_out_scores: list[float] = []
        self._images = TrainingImages()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Those of anomalib, and one that looks at the training images before a fit."""
        return [*super().configure_callbacks(), self._images]

    def setup(self, stage: str) -> None:
        """Say so if nothing will be trained, and refuse to train on a share of the images."""
        if stage == "fit" and self._is_fitted:
            logger.warning(
                "This MetaRefine model is fitted and will not be fitted again; create a new one to train anew."
            )
        elif stage == "fit" and self.trainer.world_size > 1:
            msg = (
                f"MetaRefine compares all training images in one process, found {self.trainer.world_size} processes, "
                "each of which would see its share only. Set devices=1 and num_nodes=1."
            )
            raise ValueError(msg)

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has been run, here or before the checkpoint was written."""
        return bool(self._is_fitted)

    def resize_to(self, image_size: tuple[int, int]) -> None:
        """Have images resized to a height and width, here and in exported graphs."""
        fitting = fitting_size(self._backbone, image_size)
        self.pre_processor.replace(self.configure_pre_processor(fitting, self._backbone).transform)
        logger.info("Images are resized to %d x %d pixels (height x width), the shape of most of them.", *fitting)

    def on_fit_start(self) -> None:
        """Fail now, before the pass over the images, if `fit` can't have what it needs."""
        if self._is_fitted:  # from a checkpoint, which does without both
            return
        get_learner(self.settings.meta_backend)
        if self._init_from:
            self._shared = SharedInitialisation.load(self._init_from)
            self._shared.require_same(self.model.backbone, self._backbone, self.model.flow)
        if self._ignore:
            self.model.ignored = read_regions(self._ignore)
        if self._decisions:
            self._decided = load(self._decisions)
            if not self._decided:
                msg = f"There are no decisions in {self._decisions}. Review the folder first (metarefine review)."
                raise FileNotFoundError(msg)

    def training_step(self, batch: Batch, *_args: Any, **_settings: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Collect the features of a batch ``[B x 3 x H x W]``; the loss is a dummy, nothing is learned before `fit`."""
        if not self._is_fitted:
            if len(self._store) == 0:
                warn_if_squashed(batch)
            embeddings, self._grid = self.model.embed(batch.image)
            self._store.add(batch.image_path, embeddings)
        return {"loss": torch.zeros((), requires_grad=True, device=self.device)}

    def fit(self) -> None:
        """Meta-train and refine on the collected features.

        Raises:
            ValueError: If there is no image with finite features.
        """
        if len(self._store) == 0:
            reasons = [f"{path}: {reason}" for path, reason in self._store.left_out.items()]
            reasons.append("the training dataloader was empty")
            msg = f"There is no training image to fit MetaRefine on ({reasons[0]})."
            raise ValueError(msg)
        seed = torch.initial_seed() % 2**63
        self._store.sort()
        if not self.training_images:  # they came from dataloaders, not from a datamodule
            paths = [path for path in self._store.paths if Path(path).is_file()]
            self.training_images = check_images(paths, self.bit_depth).hashes
        answers = answers_about(self._store.paths, self.training_images, self._decided)
        named = self._images.variants if self.settings.variants == "column" else {}
        labels = [named[path] for path in self._store.paths] if named else None
        with (
            progress_bars(enabled=getattr(self.trainer, "progress_bar_callback", None) is not None) as progress,
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            start = self._shared.start(self.model.flow) if self._shared else None
            result = refine_images(
                self._store, self._grid, self.settings, seed, progress,
                start=start, answers=answers, labels=labels, looked=self.model.looked, log=self._log_figures,
            )  # fmt: skip
        self.model.load_density(result.density, self._grid)
        self.model.to(self.device)
        left_out = result.refinement.left_out | self._images.unreadable
        self.refinement = replace(result.refinement, left_out=left_out)
        self.left_out_scores = result.likelihood.tolist()
        variants = result.density.variants
        looked = self.model.looked
        self.provenance = {
            "seed": seed,
            "variants": variants,
            "answers": len(answers),
            "ignored": None if looked is None else as_text(looked, self._grid),
            **data_hashes(self.refinement, self.training_images),
        }
        self._remember(result)
        if isinstance(self.post_processor, PostProcessor):  # of a model that is never validated
            try:
                calibrate_model(self)
            except ValueError as error:  # a handful of images, or all alike
                logger.warning("No threshold was set from the training images: %s", error)
        kept = self.refinement.kept
        logger.info(
            "%s\nRefinement kept %d of %d training images (%s), and %.1f %% of their patches.",
            self.refinement.structure, sum(kept), len(kept), self.refinement.stop_reason,
            100 - 100 * self.refinement.unusual_patches,
        )  # fmt: skip
        for path, reason in self._store.left_out.items():
            logger.warning("%s is left out: %s", path, reason)
        self._store = FeatureStore(self._memory_limit_mb)

    def validation_step(self, batch: Batch, *_args: Any, **_settings: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Score a batch; see `MetaRefineModel.forward`."""
        return batch.update(**self.model(batch.image)._asdict())

    @staticmethod
    def configure_optimizers() -> None:
        """MetaRefine optimises in `fit`, not in Lightning's loop."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images on one device."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """One class: training images are taken as normal until refinement says otherwise."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(
        cls, image_size: tuple[int, int] | None = None, backbone: str = OFFLINE_BACKBONE
    ) -> PreProcessor:
        """Resize to a height and width (256 x 256, rounded to what the backbone takes); normalise as it was trained."""
        mean, std = normalization(backbone)
        resize = Resize(fitting_size(backbone, image_size or (256, 256)), antialias=True)
        return ExactPreProcessor(Compose([resize, Normalize(mean=list(mean), std=list(std))]))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """AUROC of images and pixels in validation, too; pixel figures only where there are masks."""
        auroc = [
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
        ]
        return Evaluator(val_metrics=auroc, test_metrics=list(AnomalibModule.configure_evaluator().test_metrics))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what refinement decided, how the threshold was chosen, and where the model comes from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = additions(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of `on_save_checkpoint`; a ValueError if another version wrote it in another format."""
        check_format({KEY: {}, **checkpoint})
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint[KEY]
        self.refinement = Refinement.from_dict(kept["refinement"]) if kept["refinement"] else None
        for name in ("calibration", "provenance", "training_images", "left_out_scores"):
            setattr(self, name, kept[name])
        self.memory = Memory.from_dict(kept["memory"]) if kept.get("memory") else None
        if self._trainer is not None:
            give_resize_to(self.trainer.datamodule)

    def update(
        self,
        add: Iterable[str | Path] = (),
        forget: Iterable[str | Path] = (),
        answers: Mapping[str, bool] | None = None,
        reconsider: bool = False,
        variants: Mapping[str, str] = MappingProxyType({}),
    ) -> Update:
        """Add images and make the model forget some, without the others at hand; see `model.update.update`."""
        return update(self, add, forget, answers, reconsider, variants=variants)

    def explain(self, image: str | Path) -> Explanation:
        """Why an image has its score; see `model.explain.explain`."""
        return explain(self, image)

    def extra_repr(self) -> str:
        """What is remembered of the training images."""
        held = f"{len(self.memory.embeddings)} images, {self.memory.megabytes:.1f} MB" if self.memory else "no images"
        return f"(remembers): {held}"

    def _remember(self, result: Result) -> None:
        rows, (patches, channels) = len(self._store), self._store.shape
        size = rows * patches * channels * 2 / 2**20  # half precision
        if size <= self._remember_mb:
            self.memory = Memory.of(result)
        elif self._remember_mb > 0:
            logger.warning(
                "The model can't be updated later: features of %d images take %.0f MB in the checkpoint, and "
                "remember_mb is %g.", rows, size, self._remember_mb,
            )  # fmt: skip

    def _log_figures(self, figures: dict[str, float], step: int) -> None:
        for sink in self.trainer.loggers:
            sink.log_metrics(figures, step=step)


MetaRefine.__doc__ = (MetaRefine.__doc__ or "").replace("{settings}", settings_docstring(indent=8).lstrip())
