"""Makes the attention layers linear that a checkpoint lists, before its tensors are loaded."""

from __future__ import annotations

from typing import Any

import torch

from shiftadd_cli.artifact.linear_attention import LinearAttentionFormat
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.linear_attention.attention import Reach
from shiftadd_cli.runtime.linear_attention.feature_maps import make_map
from shiftadd_cli.runtime.linear_attention.module import heads_of, is_attention, linearize
from shiftadd_cli.runtime.loading import find_module


def place_linear_attention(model: Any, form: LinearAttentionFormat) -> None:
    """Give the listed layers empty feature maps on meta.

    Raises:
        ArtifactError: the model has no such layer, or one with other heads.
        LinearAttentionError: a layer cannot be linear.
    """
    for name, heads in form.modules.items():
        _, module = find_module(model, name)
        if not is_attention(module) or heads_of(module) != heads:
            raise ArtifactError(
                f"{name} is listed as linear attention with the heads {list(heads)}, but is a "
                f"{type(module).__name__} of another shape in {type(model).__name__}; load the checkpoint with the "
                "model class it was made from."
            )
        with torch.device("meta"):
            feature_map = make_map(form.map, heads)
        linearize(module, feature_map.requires_grad_(False), Reach(form.window, form.sinks))
