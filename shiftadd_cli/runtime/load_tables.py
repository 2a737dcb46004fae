"""Tables of 8-bit rows in the course of transformers' loading, and their way back to dense modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from shiftadd_cli.bcq.int8 import CODES, SCALE
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.checks import check_values
from shiftadd_cli.runtime.places import find_module, try_find_module
from shiftadd_cli.runtime.table import Int8Embedding, Table, can_hold_table, drop_table, hold_table
from shiftadd_cli.runtime.ties import Ties


def place_tables(model: Any, tables: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None) -> None:
    """Turn the listed modules of a model on meta, and those tied to them, into empty tables.

    A model of another class than the checkpoint's may lack a listed one: a body has no head. Raises ArtifactError for
    one that does not fit.
    """
    ties, held = Ties(model), set()
    find = find_module if type(model).__name__ in (model.config.architectures or ()) else try_find_module
    for name, shape in tables.items():
        if (found := find(model, name)) is None:
            continue
        place = found[0]
        for member in ties.group(place):
            _check(model.get_submodule(member), name, shape, type(model).__name__)
        stored = hold_table(model.get_submodule(place), dtype)
        for member in ties.group(place):
            if member != place:
                hold_table(model.get_submodule(member), dtype).share(stored)
            held.add(member)
    ties.rename(held, "weight", CODES)


def connect_tables(model: Any) -> None:
    """Let tied modules read one table, once it is loaded: transformers ties parameters, and a scale is none. Then mark
    embeddings with their dtype, for `model.dtype`.

    Raises ArtifactError if the checkpoint holds codes for a module that the model ties to another, or scales that are
    not finite.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tables = _tables(model)
    if tables:
        # transformers would copy the stand-in weights, which are NaN, into new embeddings.
        model.resize_token_embeddings = _refuse_resizing
    for name, module in tables.items():
        if isinstance(module, Int8Embedding):
            module.show_dtype()
        if SCALE not in module._non_persistent_buffers_set:
            check_values(name, {SCALE: module.weight_int8_scale}, module.weight.shape[1])
            continue
        if (source := ties.get(f"{name}.{CODES}")) is None:
            raise ArtifactError(
                f"The checkpoint holds {name}.{CODES}, which by its config.json is tied to another table; quantize the "
                "model again."
            )
        module.share(model.get_submodule(source.rpartition(".")[0]))


def restore_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every table back into the module it was made from, at `dtype`, tied ones tied again.

    Raises ArtifactError if one is offloaded to disk.
    """
    ties, tables = Ties(model), _tables(model)
    dense: dict[int, nn.Parameter] = {}
    for name, module in tables.items():
        if module.weight_int8.is_meta:
            raise ArtifactError(f"{name} is offloaded to disk; load the model without offloading to dequantize it.")
        key = id(module.weight_int8)
        if key not in dense:
            dense[key] = nn.Parameter(module.decode().to(dtype))
    for module in tables.values():
        drop_table(module, dense[id(module.weight_int8)])
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            bias.data = bias.data.to(dtype)
    ties.rename(tables.keys(), CODES, "weight")
    model.__dict__.pop("resize_token_embeddings", None)


def _refuse_resizing(*_: Any, **__: Any) -> NoReturn:
    raise ArtifactError("Embeddings of 8-bit rows cannot be resized; call the model's dequantize() first.")


def _tables(model: nn.Module) -> dict[str, Table]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Table)}


def _check(module: Any, name: str, shape: tuple[int, ...], model: str) -> None:
    if not can_hold_table(module):
        raise ArtifactError(
            f"{name} is listed as a table, but is a {type(module).__name__} in {model}; load the checkpoint with the "
            "model class it was made from."
        )
    if tuple(module.weight.shape) != shape:
        sizes, listed = (" x ".join(map(str, each)) for each in (module.weight.shape, shape))
        raise ArtifactError(
            f"{name} is {sizes} by the model's sizes in config.json, but {listed} by its quantization_config; quantize "
            "the model again."
        )
