"""Loads a compressed checkpoint for users of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shiftadd_cli.artifact.folder import read_json
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.paths import expanded
from shiftadd_cli.runtime import transformers_plugin
from shiftadd_cli.runtime.remote_code import brings_code
from shiftadd_cli.runtime.skeleton import read_artifact_config
from shiftadd_cli.source.locate import hub_id
from shiftadd_cli.source.vision import vision_class


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The compressed model in `folder`, with its linears packed; `options` as for transformers' `from_pretrained`.

    folder: a folder that `quantize` wrote, or a hub id of one, `USER/NAME`.

    Raises ArtifactError, naming the tensor, for a damaged checkpoint, and if there is no such folder.
    """
    transformers_plugin.register()
    remote_code = bool(options.get("trust_remote_code", False))
    path = expanded(folder)
    config: Any
    if path.is_dir():
        remote_code = remote_code and brings_code(read_json(path / "config.json"))
        config, folder = read_artifact_config(path, remote_code=remote_code), path
    elif isinstance(folder, Path) or "/" not in (hub_id(folder) or ""):
        # Our hub models always have an owner, so a bare name can only be a path.
        raise ArtifactError(f"{folder} is not a folder; give one that `shiftadd quantize` wrote, or a hub id.")
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    loader = (None if remote_code else vision_class(config, str(folder))) or AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(folder, **options)
    return model
