"""The model a checkpoint folder of ours stands for, on meta: its classes and names, and no weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.errors import ArtifactError, first_line
from shiftadd_cli.source.config import causal_lm_class
from shiftadd_cli.source.experts import split_experts
from shiftadd_cli.source.skeleton import build_skeleton
from shiftadd_cli.source.vision import vision_class


def artifact_skeleton(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The dense model on meta in the checkpoint's dtype, or another, tied weights tied, and experts of a mixture split
    where the checkpoint stores them one by one.

    Raises ArtifactError where its configuration cannot be read, SourceError where it is of no model known.
    """
    config = read_artifact_config(folder)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model_class = vision_class(config, str(folder))
    if model_class is None:
        model_class, config = causal_lm_class(config, str(folder), remote_code=False)
    split = False
    if hasattr(config, "quantization_config"):
        split = ArtifactFormat.from_dict(config.quantization_config).split_experts
        del config.quantization_config
    model = build_skeleton(model_class, config, dtype)
    if split:
        split_experts(model)
    return model


def read_artifact_config(folder: Path) -> Any:
    """The configuration of a checkpoint of ours as transformers reads it. Raises ArtifactError if it cannot."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from shiftadd_cli.runtime import transformers_plugin

    transformers_plugin.register()
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = first_line(error)
        raise ArtifactError(
            f"The configuration of {folder} cannot be read ({reason}); quantize the model again."
        ) from error
