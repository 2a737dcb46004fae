"""Tensors that are in no file because the model computes them: rotary frequencies, embedding scales, masks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shiftadd_cli.errors import SourceError
from shiftadd_cli.source.checkpoint import same_bytes
from shiftadd_cli.source.skeleton import set_tensor


@torch.no_grad()
def compute_unstored(model: nn.Module, names: Collection[str], spec: str) -> None:
    """Compute the tensors `names` of `model`, which are on meta, on the CPU, with the values transformers gives them.

    transformers computes them in `_init_weights`, called for the module that owns such a tensor or for an outer one.
    Here it is called twice, on memory filled in two different ways. A tensor with equal bytes in both runs was fully
    computed: memory that was never written would differ, and so would random initial values.

    spec: the model as the user named it, for messages.

    Raises:
        SourceError: a tensor was not computed, or differs between the two runs.
    """
    if not names:
        return
    shapes = {name: tensor for name, tensor in _tensors(model) if name in names}
    outer = {prefix for name in names for prefix in _prefixes(name)}
    with _others_on_meta(model, names):
        values = [_initialised(model, shapes, outer, high=high) for high in (True, False)]
    uncomputed = [name for name, first in values[0].items() if first.is_meta or not same_bytes(first, values[1][name])]
    if uncomputed:
        for name in names:
            set_tensor(model, name, torch.empty_like(shapes[name], device="meta"))
        raise SourceError(
            f"{spec} lacks {len(uncomputed)} tensors that {type(model).__name__} needs and does not compute by itself "
            f"(first: {uncomputed[0]}); the checkpoint is incomplete, or of a kind that is not supported."
        )


def _initialised(
    model: nn.Module, shapes: dict[str, torch.Tensor], outer: Collection[str], *, high: bool
) -> dict[str, torch.Tensor]:
    """The tensors of `shapes` after `_init_weights` of the modules `outer`, in memory that was filled before."""
    from transformers import initialization

    for name, tensor in shapes.items():
        set_tensor(model, name, torch.full_like(tensor, _fill(tensor.dtype, high=high), device="cpu"))
    with initialization.guard_torch_init_functions():
        for name, module, owner in _with_owner(model):
            if name in outer:
                owner._init_weights(module)
    return {name: tensor for name, tensor in _tensors(model) if name in shapes}


def _fill(dtype: torch.dtype, *, high: bool) -> Any:
    if dtype == torch.bool:
        return high
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan") if high else 0.0
    return torch.iinfo(dtype).max if high else 0


@contextmanager
def _others_on_meta(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Keep loaded tensors out of reach, because some classes overwrite them in `_init_weights`."""
    loaded = {name: tensor for name, tensor in _tensors(model) if name not in names and not tensor.is_meta}
    for name, tensor in loaded.items():
        set_tensor(model, name, torch.empty_like(tensor, device="meta"))
    try:
        yield
    finally:
        for name, tensor in loaded.items():
            set_tensor(model, name, tensor)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _prefixes(name: str) -> Iterator[str]:
    """The names of the modules around a tensor, including the empty name of the model itself."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _with_owner(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module, children first, with the innermost transformers model it is part of."""
    from transformers import PreTrainedModel

    def walk(name: str, module: nn.Module, owner: Any) -> Iterator[tuple[str, nn.Module, Any]]:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for leaf, child in module.named_children():
            yield from walk(f"{name}.{leaf}" if name else leaf, child, owner)
        yield name, module, owner

    yield from walk("", model, model)
