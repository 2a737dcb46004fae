"""Loading a compressed checkpoint as its users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shiftadd_cli.runtime import transformers_plugin
from shiftadd_cli.source.vision import vision_class


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The compressed model in `folder`, its linears packed; `options` as for transformers' `from_pretrained`.

    Raises ArtifactError, naming the tensor, for a damaged checkpoint.
    """
    transformers_plugin.register()
    loader = vision_class(AutoConfig.from_pretrained(folder), str(folder)) or AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(folder, **options)
    return model
