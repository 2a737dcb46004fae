"""Tensors of a checkpoint on their way into a layer of vLLM.

vLLM looks for a tensor's parameter by name and calls that parameter's `weight_loader`; it does not check that every
parameter of a quantized layer was loaded. The layer therefore gets empty parameters of the stored names that pass on
what they are given, and what holds the tensors keeps account.
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
    """What takes the tensors of a layer."""

    def stored(self) -> dict[str, torch.dtype]: ...

    def load(self, suffix: str, tensor: Tensor, shard: object = None) -> None: ...


def open_gates(layer: nn.Module, holder: Holder) -> None:
    """Give `layer` an empty parameter for every tensor of `holder`, whose `weight_loader` hands tensors to it."""
    for suffix, kind in holder.stored().items():
        gate: Any = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
        gate.weight_loader = partial(_pass_on, holder, suffix)
        layer.register_parameter(suffix, gate)


def close_gates(layer: nn.Module, holder: Holder) -> None:
    """Take these parameters away again; calling it again changes nothing."""
    for suffix in holder.stored():
        layer._parameters.pop(suffix, None)


def copy_checked(place: object, tensor: Tensor, name: str) -> None:
    """Copy into the tensor `place`; raises ArtifactError, by the tensor's name, where there is none or it differs."""
    if not isinstance(place, Tensor):
        raise ArtifactError(f"The checkpoint holds {name}, which its config.json does not list; {_AGAIN}.")
    if tensor.shape != place.shape:
        raise ArtifactError(
            f"{name} has shape {list(tensor.shape)}, and config.json asks for {list(place.shape)}; {_AGAIN}."
        )
    if tensor.dtype != place.dtype:
        raise ArtifactError(f"{name} is {tensor.dtype}, and the format says {place.dtype}; {_AGAIN}.")
    place.detach().copy_(tensor)


def check_complete(wanted: Iterable[str], loaded: Collection[str]) -> None:
    """Raise ArtifactError for the first of `wanted` that is not among `loaded`."""
    for name in wanted:
        if name not in loaded:
            raise ArtifactError(f"The checkpoint lacks the tensor {name}; {_AGAIN}.")


def _pass_on(holder: Holder, suffix: str, _: Tensor, tensor: Tensor, shard: object = None) -> None:
    """What vLLM calls: with the parameter, the tensor, and of a fused layer the part it is of."""
    holder.load(suffix, tensor, shard)
