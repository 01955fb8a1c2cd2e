"""MetaRefine, the anomalib model.

References:
    Aqeel et al., "Meta Learning-Driven Iterative Refinement for Robust Anomaly Detection in Industrial Inspection",
    arXiv 2503.01569.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from anomalib_metarefine.features.backbone import normalization
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE
from anomalib_metarefine.features.resize import ExactPreProcessor, suggested_size
from anomalib_metarefine.features.store import FeatureStore
from anomalib_metarefine.images.reading import check_images
from anomalib_metarefine.meta.maml import BACKENDS, Parameters, get_learner
from anomalib_metarefine.meta.training import check_algorithm
from anomalib_metarefine.model.calibration import calibrate_model
from anomalib_metarefine.model.export import data_hashes, describe, exportable, quantize
from anomalib_metarefine.model.initialisation import SharedInitialisation
from anomalib_metarefine.model.torch_model import MetaRefineModel
from anomalib_metarefine.progress import progress_bars
from anomalib_metarefine.refinement.engine import DensityFitter, FitSettings
from anomalib_metarefine.refinement.rounds import Refinement
from anomalib_metarefine.refinement.rules import get_rule

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

_SQUASH_WARNING = 1.25  # change of aspect ratio from which on we tell the user
_CHECKPOINT_KEY = "metarefine"


class MetaRefine(MemoryBankMixin, AnomalibModule):
    """Anomaly detection from a dirty training set.

    One pass over the training images collects features of a frozen backbone. A normalizing flow over whitened patches
    is meta-trained on episodes with deliberately dirtied support sets; then rounds of refinement fit, score, reject the
    images past a fence and fit again from the same meta-learned initialisation. The result, with the decision about
    every image, is in the checkpoint (`refinement`).

    Args:
        backbone (str): Any timm architecture.
        layers (Sequence[str] | None): Modules of the backbone to read; ``None`` takes strides 8 and 16.
        pre_trained (bool): Load pretrained weights.
        image_size (tuple[int, int]): Height and width the images are resized to. Keep the aspect ratio of your images.
        dimensions (int): Channels of a whitened patch.
        blocks (int): Coupling blocks of the flow.
        hidden (int): Width of the coupling networks.
        shrinkage (float): Weight in [0, 1] of the pooled covariance in that of every grid position.
        tail (float): Share of the patches that make the image score, in (0, 1].
        trim (float): Share of the least likely patches in every batch that the flow does not learn from, in [0, 1).
        meta_algorithm (str): How the initialisation is learned: ``"maml"``, ``"fomaml"`` or ``"pretraining"``.
        meta_backend (str): ``"torch"``, or ``"learn2learn"``, which computes the same.
        meta_steps (int): Outer steps; 0 starts from the untrained flow.
        episodes (int): Tasks per outer step.
        support_images (int): Images in a support set.
        inner_steps (int): Inner steps of an episode.
        inner_lr (float): Step size of the inner loop and of the adaptation in every round.
        meta_lr (float): Step size of the outer loop (Adam).
        init_from (str | Path | None): File of `metarefine meta-train` to start from, instead of meta-training here.
        adaptation_steps (int): Gradient steps from the meta-learned initialisation in every round.
        batch_patches (int): Patches per gradient step.
        likelihood_weight (float): Weight of the likelihood in the score that refinement rejects by. Above 0, every
            round fits the density anew, from the meta-learned initialisation, as in the paper.
        neighbour_weight (float): Weight of the distance to the nearest other images in that score.
        likeness_weight (float): How much it also counts whether what is unusual about an image is what is unusual about
            other suspicious images (`refinement.likeness`); resemblance to rejected ones counts twice that. 0 leaves it
            to the score. Needs 20 images and ``neighbour_weight`` above 0.
        rule (str): Rejection rule, with settings if need be: ``"auto"``, ``"iqr"`` (the paper's; it fails past 25 %
            contamination), ``"share:0.1"``... ``docs/rules.md`` lists them.
        rounds (int): Rounds of refinement at most; 0 trains on everything.
        patch_fence (float): Where refinement rejects no image, regions of patches that lie this many spreads further
            from their like than other patches of the same place are not learned from; 0 learns from all. Where parts
            lie anywhere, all are learned from anyway (`refinement.patches`). Needs 80 images and ``neighbour_weight``
            above 0.
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
        dimensions: int = 128,
        blocks: int = 4,
        hidden: int = 64,
        shrinkage: float = 0.2,
        tail: float = 0.03,
        trim: float = 0.1,
        meta_algorithm: str = "maml",
        meta_backend: str = "torch",
        meta_steps: int = 10,
        episodes: int = 2,
        support_images: int = 16,
        inner_steps: int = 2,
        inner_lr: float = 0.1,
        meta_lr: float = 5e-4,
        init_from: str | Path | None = None,
        adaptation_steps: int = 10,
        batch_patches: int = 1024,
        likelihood_weight: float = 0.0,
        neighbour_weight: float = 1.0,
        likeness_weight: float = 0.25,
        rule: str = "auto",
        rounds: int = 4,
        patch_fence: float = 2.5,
        memory_limit_mb: float = 2048,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        _check("shrinkage", shrinkage, 0 <= shrinkage <= 1, "a number in [0, 1]")
        _check("tail", tail, 0 < tail <= 1, "a number in (0, 1]")
        _check("trim", trim, 0 <= trim < 1, "a number in [0, 1)")
        for name, value in [
            ("likelihood_weight", likelihood_weight), ("neighbour_weight", neighbour_weight),
            ("likeness_weight", likeness_weight), ("patch_fence", patch_fence),
        ]:  # fmt: skip
            _check(name, value, value >= 0, "a number of at least 0")
        _check(
            "neighbour_weight",
            neighbour_weight,
            likelihood_weight + neighbour_weight > 0,
            "above 0 if likelihood_weight is 0",
        )
        for name, value, least in [
            ("dimensions", dimensions, 2), ("blocks", blocks, 1), ("hidden", hidden, 1), ("meta_steps", meta_steps, 0),
            ("episodes", episodes, 1), ("support_images", support_images, 1), ("inner_steps", inner_steps, 1),
            ("adaptation_steps", adaptation_steps, 0), ("batch_patches", batch_patches, 1), ("rounds", rounds, 0),
        ]:  # fmt: skip
            _check(name, value, value >= least, f"an integer of at least {least}")
        check_algorithm(meta_algorithm)
        _check("meta_backend", meta_backend, meta_backend in BACKENDS, f"one of {', '.join(BACKENDS)}")
        get_rule(rule)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(tuple(image_size), backbone)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model: MetaRefineModel = MetaRefineModel(backbone, layers, pre_trained, dimensions, blocks, hidden, tail)
        self.settings = FitSettings(
            dimensions=dimensions,
            blocks=blocks,
            hidden=hidden,
            shrinkage=shrinkage,
            tail=tail,
            trim=trim,
            meta_steps=meta_steps,
            episodes=episodes,
            support_images=support_images,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            meta_lr=meta_lr,
            meta_algorithm=meta_algorithm,
            meta_backend=meta_backend,
            adaptation_steps=adaptation_steps,
            batch_patches=batch_patches,
            likelihood_weight=likelihood_weight,
            neighbour_weight=neighbour_weight,
            likeness_weight=likeness_weight,
            rule=rule,
            rounds=rounds,
            patch_fence=patch_fence,
        )
        self._backbone, self._init_from = backbone, init_from
        self._shared: SharedInitialisation | None = None
        self._initial: Parameters | None = None
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
        self._hashes, self._unreadable = check_images(paths)
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
            self._initial = self._shared.hand_to(self.model, self._backbone)

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
        generator = torch.Generator().manual_seed(seed)
        with (
            progress_bars(enabled=getattr(self.trainer, "progress_bar_callback", None) is not None) as progress,
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            fitter = DensityFitter(
                self._store,
                self.model.flow.cpu(),
                self._grid,
                self.settings,
                generator,
                progress,
                self._log_figures,
                self._shared.whitening if self._shared else None,
                self._initial,
            )
            density, self.refinement = fitter.fit()
        self.model.load_density(density, self._grid)
        self.model.flow.to(self.device)
        self.refinement.left_out |= self._unreadable
        self.provenance = {"seed": seed, **data_hashes(self.refinement, self._hashes)}
        self._set_first_thresholds()
        logger.info(
            "Refinement kept %d of %d training images (%s), and %.1f %% of their patches.",
            sum(self.refinement.kept), len(self.refinement.kept), self.refinement.stop_reason,
            100 - 100 * self.refinement.unusual_patches,
        )  # fmt: skip
        for path, reason in self._store.left_out.items():
            logger.warning("%s is left out: %s", path, reason)
        self._store = FeatureStore(self._memory_limit_mb)

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


def _check(name: str, value: object, accepted: bool, expected: str) -> None:
    if not accepted:
        msg = f"{name} must be {expected}, found {value!r}."
        raise ValueError(msg)
