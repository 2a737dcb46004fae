"""The Python interface: what the command line does, as three functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.pipeline.job import Job
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import Report
from shiftadd_cli.runtime import transformers_plugin

__all__ = ["evaluate", "load", "quantize"]


def quantize(
    model: str, out: str | Path, recipe: str | Recipe = "default", *, overwrite: bool = False, **fields: Any
) -> Report:
    """Compress `model` (hub id, folder, .gguf file or `demo`) into the folder `out`; returns what report.json says.

    recipe: a packaged name, a YAML file or a `Recipe`; `fields` override its fields (`bits=2`, `group_size=32`, ...).
    Raises ShiftaddError with one sentence that says what to do.
    """
    settings = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, fields)
    if isinstance(recipe, Recipe) and fields:
        settings = Recipe(**{**recipe.model_dump(), **fields})
    return Job.prepare(model, Path(out), settings, overwrite=overwrite).run()


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The compressed model in `folder`, its linears packed; `options` as for transformers' `from_pretrained`.

    Raises ArtifactError, naming the tensor, for a damaged checkpoint.
    """
    transformers_plugin.register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model
