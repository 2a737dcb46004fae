"""Distinguishes linear layers from other modules."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

# Sizes of the twin that a layer is tested on.
_TWIN_OUT, _TWIN_IN = 5, 7


def linear_sizes(module: nn.Module) -> tuple[int, int, bool] | None:
    """(out_features, in_features, transposed) of a linear layer, None for any other module.

    A subclass with its own forward counts as linear if it computes the same, as Falcon's does.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear) and _is_linear(type(module), module, nn.Linear):
        return module.out_features, module.in_features, False
    if isinstance(module, Conv1D) and _is_linear(type(module), module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0]), True
    return None


def _is_linear(kind: type[nn.Module], module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the module computes the same as `base`; tested on a small twin if its class has its own forward."""
    if kind.forward is base.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    weight, bias, inputs = (
        torch.randn(size, generator=generator, device="cpu")
        for size in ((_TWIN_OUT, _TWIN_IN), (_TWIN_OUT,), (2, 3, _TWIN_IN))
    )
    transposed = base is not nn.Linear
    twin = copy.copy(module)
    twin.__dict__ |= {"in_features": _TWIN_IN, "out_features": _TWIN_OUT, "nx": _TWIN_IN, "nf": _TWIN_OUT}
    twin._parameters = dict.fromkeys(module._parameters)
    twin._parameters["weight"] = nn.Parameter(weight.T.contiguous() if transposed else weight)
    if has_bias := module._parameters.get("bias") is not None:
        twin._parameters["bias"] = nn.Parameter(bias)
    try:
        with torch.no_grad():
            # Calling the twin would run the hooks of the module.
            output = twin.forward(inputs)
    except Exception:  # a different computation may fail in any way on other sizes
        return False
    expected = nn.functional.linear(inputs, weight, bias if has_bias else None)
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected, atol=1e-5)
