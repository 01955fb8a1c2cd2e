"""anomalib's FastFlow over backbones that its own class does not take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from anomalib.metrics import Evaluator
from anomalib.models import Fastflow
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.models.components.feature_extractors import dryrun_find_featuremap_dims
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_metarefine.features.offline import OFFLINE_BACKBONE

if TYPE_CHECKING:
    import torch


class FastflowOnFeatures(Fastflow):
    """anomalib's FastFlow (flow blocks, loss, anomaly map, optimiser and steps) over any convolutional timm backbone.

    Its `Fastflow` takes four backbones, none of which can be had without a model hub.

    Args:
        backbone (str): timm architecture.
        layers (Sequence[str]): Modules whose feature maps get a flow each.
        pre_trained (bool): Load pretrained weights.
        flow_steps (int): Coupling blocks of each flow.
        hidden_ratio (float): Width of the coupling networks, relative to their input.
        max_steps (int): Gradient steps. Not epochs: a cleaned training set is smaller, and would be trained on less.
        pre_processor (PreProcessor | bool): See anomalib; its image size is the size of the flow.
        post_processor (PostProcessor | bool): See anomalib.
        evaluator (Evaluator | bool): See anomalib.
        visualizer (Visualizer | bool): See anomalib.

    References:
        Yu et al., "FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows",
        arXiv 2111.07677.
    """

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        layers: Sequence[str] = ("blocks.2", "blocks.4"),
        pre_trained: bool = True,
        flow_steps: int = 8,
        hidden_ratio: float = 1.0,
        max_steps: int = 400,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Fastflow's own constructor would build FastflowModel, which refuses the backbone.
        AnomalibModule.__init__(
            self,
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        extractor = TimmFeatureExtractor(backbone=backbone, layers=layers, pre_trained=pre_trained)
        self.model = _FlowsOnFeatures(extractor, tuple(self.input_size), flow_steps, hidden_ratio)
        self.loss = FastflowLoss()
        self.max_steps = max_steps

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """FastFlow's, for a number of steps, which `anomalib benchmark` has no setting for, and one validation."""
        length = {"max_epochs": -1, "max_steps": self.max_steps}
        once = {"check_val_every_n_epoch": None, "val_check_interval": self.max_steps}
        return {**super().trainer_arguments, **length, **once}

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The default of anomalib's models; FastFlow's own stops on data without masks."""
        return AnomalibModule.configure_evaluator()


class _FlowsOnFeatures(FastflowModel):
    """`FastflowModel` with another feature extractor; its `forward` is inherited."""

    def __init__(
        self, extractor: TimmFeatureExtractor, input_size: tuple[int, int], flow_steps: int, hidden_ratio: float
    ) -> None:
        nn.Module.__init__(self)
        self.input_size = input_size
        self.feature_extractor = extractor.eval().requires_grad_(False)
        sizes = dryrun_find_featuremap_dims(extractor, input_size, extractor.layers)
        shapes = [[sizes[layer]["num_features"], *sizes[layer]["resolution"]] for layer in extractor.layers]
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
