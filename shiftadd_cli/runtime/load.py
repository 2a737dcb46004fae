"""Loading a compressed checkpoint as its users do."""

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
    """The compressed model in `folder`, its linears packed; `options` as for transformers' `from_pretrained`.

    folder: a folder that `quantize` wrote, or a hub id of one, `USER/NAME`.

    Raises ArtifactError, naming the tensor, for a damaged checkpoint, and where there is no such folder.
    """
    transformers_plugin.register()
    remote_code = bool(options.get("trust_remote_code", False))
    place = expanded(folder)
    config: Any
    if place.is_dir():
        remote_code = remote_code and brings_code(read_json(place / "config.json"))
        config, folder = read_artifact_config(place, remote_code=remote_code), place
    elif isinstance(folder, Path) or "/" not in (hub_id(folder) or ""):
        # The hub has no models of ours under a bare name, and is not asked for what can only be a path.
        raise ArtifactError(f"{folder} is no folder; give one that `shiftadd quantize` wrote, or a hub id.")
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    loader = (None if remote_code else vision_class(config, str(folder))) or AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(folder, **options)
    return model
