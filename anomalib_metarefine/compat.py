"""Private names of other packages that we need, each with the reason; tests/test_compat.py fails when one changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch


def set_pretrained_weights(names: Iterable[str], weights: Mapping[str, torch.Tensor]) -> None:
    """Let ``timm.create_model(name, pretrained=True)`` load ``weights``, for any caller.

    timm has no public call that changes the configuration of a registered architecture; it reads ``state_dict`` of
    that configuration before it asks the network.

    Args:
        names (Iterable[str]): Registered architectures, with and without tag.
        weights (Mapping[str, torch.Tensor]): Under timm's names of the tensors.

    Raises:
        KeyError: If timm knows no such architecture.
    """
    from timm.models._registry import _model_pretrained_cfgs

    for name in names:
        _model_pretrained_cfgs[name].state_dict = weights
