"""MetaRefine, the anomalib model.

References:
    Aqeel et al., "Meta Learning-Driven Iterative Refinement for Robust Anomaly Detection in Industrial Inspection",
    arXiv 2503.01569.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.deploy.export import CompressionType
from anomalib.metrics import AUROC, F1Score
from anomalib.metrics.evaluator import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_metarefine.density.patch_density import trainable
from anomalib_metarefine.features.backbone import normalization
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.features.resize import ExactPreProcessor, suggested_size
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.images.reading import check_images
from anomalib_metarefine.meta.maml import get_learner
from anomalib_metarefine.model.calibration import calibrate_model
from anomalib_metarefine.model.export import data_hashes, describe, exportable, quantize
from anomalib_metarefine.model.initialisation import SharedInitialisation
from anomalib_metarefine.model.torch_model import MetaRefineModel
from anomalib_metarefine.progress import progress_bars
from anomalib_metarefine.refinement.engine import refine_images
from anomalib_metarefine.refinement.rounds import Refinement
from anomalib_metarefine.refinement.rules import get_rule
from anomalib_metarefine.settings import Settings, setting_names, settings_docstring

if TYPE_CHECKING:
    import openvino

    from anomalib_metarefine.density.flow import PatchFlow
    from anomalib_metarefine.density.patch_density import Parameters
    from anomalib_metarefine.features.embedding import Whitening

logger = logging.getLogger(__name__)

_SQUASH_WARNING = 1.25  # change of aspect ratio from which on we tell the user
_CHECKPOINT_KEY = "metarefine"
_DEFAULTS = Settings()


class MetaRefine(MemoryBankMixin, AnomalibModule):
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
        image_size (tuple[int, int]): Height and width the images are resized to. Keep the aspect ratio of your images.
        {settings}
        init_from (str | Path | None): File of `metarefine meta-train` to start from, instead of meta-training here.
        memory_limit_mb (float): Past it, features go to a memory-mapped temporary file.
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
        image_size: tuple[int, int] = (256, 256),
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
        rule: str = _DEFAULTS.rule,
        rounds: int = _DEFAULTS.rounds,
        patch_fence: float = _DEFAULTS.patch_fence,
        init_from: str | Path | None = None,
        memory_limit_mb: float = 2048,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        chosen = locals()
        settings = Settings(**{name: chosen[name] for name in setting_names()})
        get_rule(settings.rule)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(tuple(image_size), backbone)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model: MetaRefineModel = MetaRefineModel(
            backbone, layers, pre_trained, settings.dimensions, settings.blocks, settings.hidden, settings.tail
        )
        self.settings = settings
        self._backbone, self._init_from = backbone, init_from
        self._shared: SharedInitialisation | None = None
        self.refinement: Refinement | None = None
        self.calibration: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}
        self._memory_limit_mb = memory_limit_mb
        self._store = FeatureStore(memory_limit_mb)
        self._grid: tuple[int, int] | None = None
        self._hashes: dict[str, str] = {}
        self._unreadable: dict[str, str] = {}
        self._full_train_data: Any = None

    def setup(self, stage: str) -> None:
        """Leave unreadable images out of this training run; the user's datamodule gets them back before it starts."""
        datamodule = getattr(self.trainer, "datamodule", None)
        train_data = getattr(datamodule, "train_data", None)
        if stage == "fit" and self._is_fitted:
            logger.warning(
                "This MetaRefine model is fitted and will not be fitted again; create a new one to train anew."
            )
        if stage != "fit" or self._is_fitted or train_data is None:
            return
        paths = train_data.samples["image_path"].tolist()
        if not paths:
            msg = f"{datamodule.name} has no training images. Check its path and its split settings."
            raise ValueError(msg)
        checked = check_images(paths)
        checked.require_as_trained(len(paths))
        self._hashes, self._unreadable = checked.hashes, checked.unreadable
        if len(self._unreadable) == len(paths):
            first, reason = next(iter(self._unreadable.items()))
            msg = f"None of the {len(paths)} training images can be read. The first is {first} ({reason})."
            raise ValueError(msg)
        if self._unreadable:
            listing = "\n".join(f"  {path}: {reason}" for path, reason in self._unreadable.items())
            logger.warning("%d training images can't be read and are left out:\n%s", len(self._unreadable), listing)
            self._full_train_data = train_data
            readable = [i for i, path in enumerate(paths) if str(path) not in self._unreadable]
            datamodule.train_data = train_data.subsample(readable)

    def on_fit_start(self) -> None:
        """Fail now, before the pass over the images, if meta-learning can't have what it needs.

        Not sooner: a fitted checkpoint is loaded by now, and does without both.
        """
        if self._is_fitted:
            return
        get_learner(self.settings.meta_backend)
        if self._init_from:
            self._shared = SharedInitialisation.load(self._init_from)
            self._shared.require_same(self.model.backbone, self._backbone, self.model.flow)

    def on_train_start(self) -> None:
        """Give the datamodule its full training set back: the training dataloader exists by now."""
        if self._full_train_data is not None:
            self.trainer.datamodule.train_data = self._full_train_data
            self._full_train_data = None

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Collect the features of a batch.

        Args:
            batch (Batch): Images ``[B x 3 x H x W]`` and their paths.
            *args (Any): Unused.
            **kwargs (Any): Unused.

        Returns:
            STEP_OUTPUT: A dummy loss; nothing is learned before `fit`.
        """
        del args, kwargs
        if not self._is_fitted:
            if len(self._store) == 0:
                self._warn_if_squashed(batch)
            embeddings, self._grid = self.model.embed(batch.image)
            self._store.add(batch.image_path, embeddings)
        return {"loss": torch.zeros((), requires_grad=True, device=self.device)}

    def fit(self) -> None:
        """Meta-train and refine on the collected features.

        Raises:
            ValueError: If there is no image with finite features.
        """
        if len(self._store) == 0:
            left_out = next(iter(self._store.left_out.items()), None)
            reason = f"{left_out[0]}: {left_out[1]}" if left_out else "the training dataloader was empty"
            msg = f"There is no training image to fit MetaRefine on ({reason})."
            raise ValueError(msg)
        seed = torch.initial_seed() % 2**63
        self._store.sort()
        with (
            progress_bars(enabled=getattr(self.trainer, "progress_bar_callback", None) is not None) as progress,
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            start = self._start()
            result = refine_images(
                self._store, self._grid, self.settings, seed, progress, start=start, log=self._log_figures
            )
        self.model.load_density(result.density, self._grid)
        self.model.to(self.device)
        self.refinement = replace(result.refinement, left_out=result.refinement.left_out | self._unreadable)
        self.provenance = {"seed": seed, **data_hashes(self.refinement, self._hashes)}
        self._set_first_thresholds()
        logger.info(self.refinement.structure)
        logger.info(
            "Refinement kept %d of %d training images (%s), and %.1f %% of their patches.",
            sum(self.refinement.kept), len(self.refinement.kept), self.refinement.stop_reason,
            100 - 100 * self.refinement.unusual_patches,
        )  # fmt: skip
        for path, reason in self._store.left_out.items():
            logger.warning("%s is left out: %s", path, reason)
        self._store = FeatureStore(self._memory_limit_mb)

    def _start(self) -> tuple[Whitening, PatchFlow, Parameters] | None:
        """The shared initialisation, if there is one."""
        if self._shared is None:
            return None
        flow = copy.deepcopy(self.model.flow).cpu()
        flow.load_state_dict(self._shared.flow)
        return self._shared.whitening, flow, trainable(flow)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Score a batch; see `MetaRefineModel.forward`."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    @staticmethod
    def configure_optimizers() -> None:
        """MetaRefine optimises in `fit`, not in Lightning's loop."""
        return

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
        """Resize, and normalise as the backbone was trained.

        Args:
            image_size (tuple[int, int] | None): Height and width; ``None`` means 256 x 256.
            backbone (str): timm architecture whose mean and standard deviation are taken.

        Returns:
            PreProcessor: Its exported form resizes exactly like its training form, antialiasing included.
        """
        mean, std = normalization(backbone)
        resize = Resize(tuple(image_size or (256, 256)), antialias=True)
        return ExactPreProcessor(Compose([resize, Normalize(mean=list(mean), std=list(std))]))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """AUROC of images and pixels in validation and test, F1 in test; pixel figures only where there are masks."""

        def auroc() -> list[AUROC]:
            return [
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            ]

        f1_scores = [
            F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
            F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
        ]
        return Evaluator(val_metrics=auroc(), test_metrics=[*auroc(), *f1_scores])

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Anomalib's export, with ``metadata.json`` beside it."""
        path = super().to_torch(export_root, model_file_name)
        describe(self, path, "torch", "FP32", None)
        return path

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Anomalib's export, at the opset that torch's exporter writes natively, with ``metadata.json`` beside it.

        It is asked for 14 by default, knows 18 and up, and fails to convert the finished graph down.
        """
        kwargs.setdefault("opset_version", 18)
        with exportable(self):
            path = super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        describe(self, path, "onnx", "FP32", input_size)
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Anomalib's export, with ``metadata.json`` beside it; ``INT8_PTQ`` quantises the backbone alone."""
        path = super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)
        precision = compression_type.name.split("_")[0] if compression_type else "FP32"
        describe(self, path, "openvino", precision, input_size)
        return path

    def _post_training_quantization_ov(
        self, model: openvino.Model, datamodule: AnomalibDataModule | None = None
    ) -> openvino.Model:
        return quantize(self, model, datamodule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what refinement decided, how the threshold was chosen, and where the model comes from."""
        super().on_save_checkpoint(checkpoint)
        if self.refinement is not None:
            checkpoint[_CHECKPOINT_KEY] = {
                "refinement": self.refinement.to_dict(),
                "calibration": self.calibration,
                "provenance": self.provenance,
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        if _CHECKPOINT_KEY in checkpoint:
            kept = checkpoint[_CHECKPOINT_KEY]
            self.refinement = Refinement.from_dict(kept["refinement"])
            self.calibration, self.provenance = kept["calibration"], kept["provenance"]

    def _set_first_thresholds(self) -> None:
        """Thresholds from the training images, for a model that is never validated; a validation replaces them."""
        if not isinstance(self.post_processor, PostProcessor):
            return
        try:
            calibrate_model(self)
        except ValueError as error:  # a handful of images, or all alike
            logger.info("No threshold from the training images: %s", error)

    def _log_figures(self, figures: dict[str, float], step: int) -> None:
        for sink in self.trainer.loggers:
            sink.log_metrics(figures, step=step)

    def _warn_if_squashed(self, batch: Batch) -> None:
        if not batch.image_path:
            return
        with Image.open(batch.image_path[0]) as image:
            width, height = image.size
        rows, columns = batch.image.shape[-2:]
        change = (width / height) / (columns / rows)
        if max(change, 1 / change) > _SQUASH_WARNING:
            suggestion = suggested_size(height, width, rows * columns)
            logger.warning(
                "Images of %d x %d pixels (height x width) are squashed to %d x %d, which hides thin defects. "
                "Set image_size to their shape, e.g. %s or a multiple.", height, width, rows, columns, suggestion,
            )  # fmt: skip


MetaRefine.__doc__ = (MetaRefine.__doc__ or "").replace("{settings}", settings_docstring(indent=8).lstrip())
