"""The model of one of our checkpoint folders on meta: its classes and names, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shiftadd_cli.artifact.folder import read_json
from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.errors import ArtifactError, first_line
from shiftadd_cli.runtime.remote_code import brings_code
from shiftadd_cli.source.config import model_class
from shiftadd_cli.source.experts import split_experts
from shiftadd_cli.source.skeleton import build_skeleton


def artifact_skeleton(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """The dense model on meta, in the checkpoint's dtype or another, with weights tied and the experts of a mixture
    split where the checkpoint stores them one by one.

    trust_remote_code: run model code that comes with the checkpoint.

    Raises ArtifactError if its configuration cannot be read, SourceError if the model is unknown.
    """
    remote_code = trust_remote_code and brings_code(read_json(folder / "config.json"))
    config = read_artifact_config(folder, remote_code=remote_code)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    kind, config = model_class(config, str(folder), remote_code=remote_code)
    split = False
    if hasattr(config, "quantization_config"):
        split = ArtifactFormat.from_dict(config.quantization_config).split_experts
        del config.quantization_config
    model = build_skeleton(kind, config, dtype)
    if split:
        split_experts(model)
    return model


def read_artifact_config(folder: Path, *, remote_code: bool = False) -> Any:
    """The configuration of one of our checkpoints as transformers reads it. Raises ArtifactError if it cannot.

    remote_code: run the model's own code.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    from shiftadd_cli.runtime import transformers_plugin

    transformers_plugin.register()
    raw = read_json(folder / "config.json")
    if not remote_code and brings_code(raw) and raw.get("model_type") not in CONFIG_MAPPING:
        raise ArtifactError(
            f"The model in the checkpoint {folder} brings its own code, which runs only with `trust_remote_code=True`."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = first_line(error)
        raise ArtifactError(
            f"The configuration of {folder} cannot be read ({reason}); quantize the model again."
        ) from error
