"""Passes tensors of a checkpoint to a layer of vLLM.

vLLM looks up a tensor's parameter by name and calls that parameter's `weight_loader`; it does not check that every
parameter of a quantized layer was loaded. The layer therefore gets empty parameters with the stored names, which pass
the tensors on to the module that holds them and keeps track of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shiftadd_cli.errors import ArtifactError

_AGAIN = "copy it again, or quantize the model again"


class Holder(Protocol):
    """A module that takes the tensors of a layer."""

    def stored(self) -> dict[str, torch.dtype]: ...

    def load(self, suffix: str, tensor: Tensor, shard: object = None) -> None: ...


def open_gates(layer: nn.Module, holder: Holder) -> None:
    """Give `layer` an empty parameter for every tensor of `holder`, whose `weight_loader` hands tensors to it."""
    for suffix, kind in holder.stored().items():
        gate: Any = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
        gate.weight_loader = partial(_pass_on, holder, suffix)
        layer.register_parameter(suffix, gate)


def close_gates(layer: nn.Module, holder: Holder) -> None:
    """Remove these parameters again; calling it again changes nothing."""
    for suffix in holder.stored():
        layer._parameters.pop(suffix, None)


def copy_checked(target: object, tensor: Tensor, name: str) -> None:
    """Copy into `target`. Raises ArtifactError, naming the tensor, if `target` is no tensor or has another form."""
    if not isinstance(target, Tensor):
        raise ArtifactError(f"The checkpoint holds {name}, which its config.json does not list; {_AGAIN}.")
    if tensor.shape != target.shape:
        raise ArtifactError(
            f"{name} has shape {list(tensor.shape)}, but config.json asks for {list(target.shape)}; {_AGAIN}."
        )
    if tensor.dtype != target.dtype:
        raise ArtifactError(f"{name} is {tensor.dtype}, and the format says {target.dtype}; {_AGAIN}.")
    target.detach().copy_(tensor)


def check_complete(expected: Iterable[str], loaded: Collection[str]) -> None:
    """Raise ArtifactError for the first of `expected` that is not among `loaded`."""
    for name in expected:
        if name not in loaded:
            raise ArtifactError(f"The checkpoint lacks the tensor {name}; {_AGAIN}.")


def _pass_on(holder: Holder, suffix: str, _: Tensor, tensor: Tensor, shard: object = None) -> None:
    """The loader that vLLM calls with the parameter, the tensor and, for a fused layer, the name of its part."""
    holder.load(suffix, tensor, shard)
