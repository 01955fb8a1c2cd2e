"""Fails when a private name of another package that we use is gone or means something else."""

import timm
import torch
from timm.models._registry import _model_pretrained_cfgs

from anomalib_metarefine.compat import set_pretrained_weights


def test_timm_loads_the_weights_it_is_given(monkeypatch):
    name = "tf_efficientnet_lite0"
    monkeypatch.setattr(_model_pretrained_cfgs[name], "state_dict", None)
    weights = {key: torch.zeros_like(value) for key, value in timm.create_model(name).state_dict().items()}
    set_pretrained_weights([name], weights)
    model = timm.create_model(name, pretrained=True)
    assert all(not value.any() for value in model.state_dict().values())
