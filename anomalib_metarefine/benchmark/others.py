"""anomalib's own models on the offline backbone, each ready to be trained by anomalib's Engine.

PaDiM, PatchCore and DFM are anomalib's classes as they are. Its `Fastflow` takes four backbones, none of which can be
had without a model hub, so its parts are put on our backbone here. EfficientAd can't be: its teacher's weights and the
ImageNette images that it needs in training are downloads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from anomalib.metrics import Evaluator, create_anomalib_metric
from anomalib.models import Dfm, Fastflow, Padim, Patchcore
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.models.components.feature_extractors import dryrun_find_featuremap_dims
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchmetrics.classification import BinaryAUROC
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_metarefine.benchmark.memo import MemoisedExtractor
from anomalib_metarefine.benchmark.separable import SeparableBlur
from anomalib_metarefine.features.backbone import normalization
from anomalib_metarefine.features.offline import OFFLINE_BACKBONE, use_offline_weights

if TYPE_CHECKING:
    from anomalib_metarefine.benchmark.memo import Memo

LAYERS = ("blocks.2", "blocks.4")  # strides 8 and 16


@dataclass(frozen=True)
class Recipe:
    """How a model is built and trained.

    Attributes:
        model (type[AnomalibModule]): Its class.
        arguments (dict[str, Any]): What differs from the class's defaults.
        batch_size (int): Images of a training batch.
    """

    model: type[AnomalibModule]
    arguments: dict[str, Any]
    batch_size: int = 32

    @property
    def settings(self) -> str:
        """The arguments in one line, for the table."""
        named = {**self.arguments, "batch_size": self.batch_size}
        return ", ".join(f"{key}={value}" for key, value in named.items())


class FastflowOnFeatures(Fastflow):
    """anomalib's FastFlow (flow blocks, loss, anomaly map, optimiser and steps) over any convolutional timm backbone.

    Args:
        backbone (str): timm architecture.
        layers (tuple[str, ...]): Modules whose feature maps get a flow each.
        flow_steps (int): Coupling blocks of each flow.
        hidden_ratio (float): Width of the coupling networks, relative to their input.
        max_steps (int): Gradient steps. Not epochs: a cleaned training set is smaller, and would be trained on less.
        pre_processor (PreProcessor | bool): See anomalib; its image size is the size of the flow.
        post_processor (Any): See anomalib.
        evaluator (Evaluator | bool): See anomalib.
        visualizer (Any): See anomalib.

    References:
        Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows",
        arXiv 2111.07677.
    """

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        layers: tuple[str, ...] = LAYERS,
        flow_steps: int = 8,
        hidden_ratio: float = 1.0,
        max_steps: int = 400,
        pre_processor: PreProcessor | bool = True,
        post_processor: Any = True,  # noqa: ANN401
        evaluator: Evaluator | bool = True,
        visualizer: Any = True,  # noqa: ANN401
    ) -> None:
        # Fastflow's own constructor would build FastflowModel, which refuses the backbone.
        AnomalibModule.__init__(
            self,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.max_steps = max_steps
        self.model = _FlowsOnFeatures(tuple(self.input_size), backbone, layers, flow_steps, hidden_ratio)
        self.loss = FastflowLoss()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """FastFlow's, for a number of steps that ends."""
        return {**super().trainer_arguments, "max_epochs": -1, "max_steps": self.max_steps, "devices": 1}


class _FlowsOnFeatures(FastflowModel):
    """`FastflowModel` with another feature extractor; its `forward` is inherited."""

    def __init__(
        self,
        input_size: tuple[int, int],
        backbone: str,
        layers: tuple[str, ...],
        flow_steps: int,
        hidden_ratio: float,
    ) -> None:
        nn.Module.__init__(self)
        self.input_size = input_size
        self.feature_extractor = TimmFeatureExtractor(backbone=backbone, layers=list(layers), pre_trained=True).eval()
        self.feature_extractor.requires_grad_(False)
        sizes = dryrun_find_featuremap_dims(self.feature_extractor, input_size, list(layers))
        shapes = [[sizes[layer]["num_features"], *sizes[layer]["resolution"]] for layer in layers]
        # Trainable, as upstream has it for convolutional backbones.
        self.norms = nn.ModuleList(nn.LayerNorm(shape, elementwise_affine=True) for shape in shapes)
        self.fast_flow_blocks = nn.ModuleList(
            create_fast_flow_block(shape, conv3x3_only=False, hidden_ratio=hidden_ratio, flow_steps=flow_steps)
            for shape in shapes
        )
        self.anomaly_map_generator = AnomalyMapGenerator(input_size=input_size)

    def _get_cnn_features(self, input_tensor: torch.Tensor) -> list[torch.Tensor]:
        maps = self.feature_extractor(input_tensor).values()
        return [norm(features) for norm, features in zip(self.norms, maps, strict=True)]


class RankAUROC(BinaryAUROC):
    """AUROC of raw anomaly scores of any size.

    torchmetrics puts scores outside [0, 1] through a sigmoid, batch by batch, in single precision: large distances
    and reconstruction errors then all become 1.0, and AUROC 0.5. This squashes them first, in double precision, by a
    function that keeps every order.
    """

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Add scores ``[B]`` and labels ``[B]``."""
        scores = preds.double()
        super().update(0.5 + 0.5 * scores / (1 + scores.abs()), target)


RECIPES = {
    "Padim": Recipe(Padim, {"backbone": OFFLINE_BACKBONE, "layers": list(LAYERS), "n_features": 100}),
    # The coreset's time is quadratic in the images: anomalib's 0.1 would take most of an hour, a hundred times over.
    "Patchcore": Recipe(
        Patchcore, {"backbone": OFFLINE_BACKBONE, "layers": list(LAYERS), "coreset_sampling_ratio": 0.001}
    ),
    "Dfm": Recipe(Dfm, {"backbone": OFFLINE_BACKBONE, "layer": "blocks.4"}),
    # A third of the time of upstream's flow_steps=8 and hidden_ratio=1.0: half a minute on one core.
    "Fastflow": Recipe(FastflowOnFeatures, {"flow_steps": 4, "hidden_ratio": 0.16, "max_steps": 400}, batch_size=8),
}


def build(name: str, image_size: tuple[int, int], memo: Memo | None = None) -> AnomalibModule:
    """A fresh model that measures image AUROC and nothing else.

    Args:
        name (str): A key of `RECIPES`.
        image_size (tuple[int, int]): Height and width of its input.
        memo (Memo | None): Where its feature maps are kept, which also makes its blur separable; ``None`` leaves the
            model as anomalib has it, which is slower and gives the same scores.

    Returns:
        AnomalibModule: The model, on the offline weights.

    Raises:
        ValueError: If there is no such model.
    """
    if name not in RECIPES:
        msg = f"There is no recipe for a model {name!r}. Choose from {', '.join(RECIPES)}."
        raise ValueError(msg)
    use_offline_weights()
    mean, std = normalization(OFFLINE_BACKBONE)
    resize = Resize(image_size, antialias=True)
    model = RECIPES[name].model(
        **RECIPES[name].arguments,
        pre_processor=PreProcessor(Compose([resize, Normalize(mean=list(mean), std=list(std))])),
        post_processor=False,  # its normalisation would need a validation set
        evaluator=Evaluator(
            test_metrics=[create_anomalib_metric(RankAUROC)(fields=["pred_score", "gt_label"], prefix="image_")]
        ),
        visualizer=False,
    )
    if memo is not None:
        model.model.feature_extractor = MemoisedExtractor(model.model.feature_extractor, memo)
        blur = getattr(getattr(model.model, "anomaly_map_generator", None), "blur", None)
        if blur is not None:
            model.model.anomaly_map_generator.blur = SeparableBlur(blur)
    return model
