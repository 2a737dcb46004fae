"""A model on the meta device, exactly as transformers builds it before loading weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from shiftadd_cli.errors import SourceError


def build_skeleton(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """`model_class(config)` on meta in evaluation mode: without memory or gradients, with tied weights tied.

    Parameters that transformers keeps in float32 under `dtype` are float32 here too. `config` is copied.

    Raises:
        SourceError: the class refuses the configuration.
    """
    from transformers.utils.generic import ContextManagers

    config = copy.deepcopy(config)
    config.dtype = dtype
    for part in config.sub_configs:
        if (sub_config := getattr(config, part, None)) is not None:
            sub_config.dtype = dtype
    try:
        with ContextManagers(model_class.get_init_context(dtype, False, False, None)):
            model = model_class(config)
    except Exception as error:  # a class may fail in any way on inconsistent sizes
        raise SourceError(
            f"{model_class.__name__} cannot be built from this configuration ({str(error).strip().rstrip('.')}); "
            "check config.json against the original."
        ) from error
    model.to("meta")  # a few classes create parameters on the CPU despite the context
    model.tie_weights(recompute_mapping=False)
    _keep_in_float32(model, dtype)
    model.requires_grad_(False)
    return model.eval()


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of parameter names that transformers keeps in another dtype than `dtype`."""
    return dict(model._get_dtype_plan(dtype))


def tied_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of full names of one and the same parameter. The first name of a group is the one that transformers stores
    it under; the others follow in the order of the model's state."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    targets = getattr(model, "all_tied_weights_keys", {})
    return tuple(tuple(sorted(group, key=targets.__contains__)) for group in names.values() if len(group) > 1)


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the tensor `name` by `value`; a parameter stays a parameter, a buffer stays a buffer."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    from transformers.core_model_loading import build_glob_alternation

    if not (plan := dtype_plan(model, dtype)):
        return
    pattern, names, _ = build_glob_alternation(list(plan))
    groups = tied_groups(model)
    for name, tensor in model.state_dict().items():
        if (match := pattern.search(name)) and match.lastgroup is not None:
            value = torch.empty_like(tensor, dtype=plan[names[match.lastgroup]])
            if name in dict(model.named_parameters(remove_duplicate=False)):
                value = nn.Parameter(value, requires_grad=False)
            for alias in next((group for group in groups if name in group), (name,)):
                set_tensor(model, alias, value)
