"""Finding the modules that a checkpoint lists in a model that may be a part of the one it was made from."""

from __future__ import annotations

from typing import Any

from torch import nn

from shiftadd_cli.errors import ArtifactError


def find_module(model: nn.Module, name: str) -> tuple[str, Any]:
    """A listed module and its name in `model`, which may be the body alone or have a body the list knows nothing of.

    Raises ArtifactError if there is none.
    """
    if (found := try_find_module(model, name)) is None:
        raise ArtifactError(
            f"{name} is listed as compressed, but {type(model).__name__} has no such module; load the checkpoint with "
            "the model class it was made from."
        )
    return found


def try_find_module(model: nn.Module, name: str) -> tuple[str, Any] | None:
    """The same, None if there is none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for place in (name, name.removeprefix(prefix), prefix + name):
        try:
            return place, model.get_submodule(place)
        except AttributeError:
            continue
    return None
