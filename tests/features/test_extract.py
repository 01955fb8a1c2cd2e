import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_metarefine.features.backbone import Backbone
from anomalib_metarefine.features.extract import Recipe, collect_features
from anomalib_metarefine.model.lightning_model import MetaRefine

NAME = "tf_efficientnet_lite0"


def test_features_are_those_that_metarefine_trains_on(parts):
    paths = sorted((parts / "train/good").iterdir())[:5]
    store, grid, _ = collect_features(paths, Recipe(Backbone(NAME), NAME, (64, 96), 2))
    model = MetaRefine(image_size=(64, 96), visualizer=False)
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1) / 255 for p in paths]
    )
    expected, expected_grid = model.model.embed(model.pre_processor.transform(images))
    assert grid == expected_grid == (4, 6)
    assert store.paths == [str(p) for p in paths]
    torch.testing.assert_close(store.images(), expected, rtol=1e-2, atol=1e-2)


def test_says_why_when_no_image_has_finite_features(parts):
    backbone = Backbone(NAME)
    next(backbone.net.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"no image to learn from.*000\.png: its features are not finite"):
        collect_features(sorted((parts / "train/good").iterdir())[:3], Recipe(backbone, NAME, (64, 64), 2))
