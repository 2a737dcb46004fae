"""Loads the stored tensors of a checkpoint into the model built for it, so that none keeps a random value.

The model may be a part of the one that the checkpoint was made from. transformers records tied parameters by name; the
record is updated when modules rename their parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from shiftadd_cli.artifact.format import SUFFIXES
from shiftadd_cli.artifact.shards import read_header
from shiftadd_cli.bcq.int8 import CODES, SCALE
from shiftadd_cli.bcq.outliers import are_columns
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.runtime.table import Int8Table, Table, can_hold_table, drop_table, hold_table


def find_module(model: nn.Module, name: str) -> tuple[str, Any]:
    """A listed module and its name in `model`, which may be the body alone, or wrap the listed model as its body.

    Raises ArtifactError if there is none.
    """
    if (result := try_find_module(model, name)) is None:
        raise ArtifactError(
            f"{name} is listed as compressed, but {type(model).__name__} has no such module; load the checkpoint with "
            "the model class it was made from."
        )
    return result


def try_find_module(model: nn.Module, name: str) -> tuple[str, Any] | None:
    """Like `find_module`, but None if there is no such module."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        try:
            return path, model.get_submodule(path)
        except AttributeError:
            continue
    return None


class Ties:
    """The ties of a model and of all transformers models inside it, as they are before modules are replaced."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedModel

        self._model = model
        # Expanded now, because transformers matches the patterns against the present parameters.
        self._expanded: list[tuple[str, Any, dict[str, str]]] = [
            (f"{name}." if name else "", part, part.get_expanded_tied_weights_keys(all_submodels=False))
            for name, part in model.named_modules()
            if isinstance(part, PreTrainedModel)
        ]

    def group(self, module: str) -> list[str]:
        """Names of the modules that share the weight of `module`, the one it is stored for first, `module` included."""
        ties: dict[str, str] = getattr(self._model, "all_tied_weights_keys", {})
        weight = f"{module}.weight"
        source = ties.get(weight, weight)
        members = [source, *(target for target, origin in ties.items() if origin == source)]
        return [name.removesuffix(".weight") for name in members]

    def rename(self, modules: Collection[str], old: str, *new: str) -> None:
        """Record that `new` replaces the parameter `old` of each of `modules`; if `new` is empty, it is gone."""

        def renamed(ties: dict[str, str], prefix: str) -> dict[str, str]:
            pairs = [
                pair
                for target, source in ties.items()
                for pair in zip(names(target, prefix), names(source, prefix), strict=True)
            ]
            return dict(pairs)

        def names(name: str, prefix: str) -> list[str]:
            parent, _, leaf = (prefix + name).rpartition(".")
            if leaf != old or parent not in modules:
                return [name]
            return [f"{parent}.{suffix}".removeprefix(prefix) for suffix in new]

        for number, (prefix, part, expanded) in enumerate(self._expanded):
            if expanded:
                part._tied_weights_keys = renamed(expanded, prefix)
                self._expanded[number] = (prefix, part, part._tied_weights_keys)
            part.all_tied_weights_keys = renamed(part.all_tied_weights_keys, prefix)


_AGAIN = "quantize the model again"


def check_files(model: nn.Module, files: Sequence[str]) -> None:
    """Compare shapes and stored dtypes in safetensors headers with the model's; raises ArtifactError if they differ.

    Names that the model lacks are left to `check_loaded`, since transformers may rename them on loading.
    """
    expected = model.state_dict()
    # The index is untrusted and may name any file.
    if len({Path(file).parent for file in files}) > 1 or any(".." in Path(file).parts for file in files):
        raise ArtifactError(f"The index of {files[0]} names files outside its folder; do not use this checkpoint.")
    for file in files:
        if not file.endswith(".safetensors"):
            raise ArtifactError(f"{file} is not a safetensors file, and shiftadd checkpoints have no others; {_AGAIN}.")
        for name, (stored_shape, kind) in read_header(Path(file)).items():
            if name not in expected:
                continue
            shape, dtype = tuple(expected[name].shape), expected[name].dtype
            if stored_shape != shape:
                raise ArtifactError(
                    f"{name} in {file} has shape {list(stored_shape)}, but config.json asks for {list(shape)}; "
                    f"{_AGAIN}."
                )
            if name.endswith(SUFFIXES) and kind != dtype:
                raise ArtifactError(f"{name} in {file} is {kind}, and the format says {dtype}; {_AGAIN}.")


def check_loaded(model: nn.Module, architectures: Sequence[str]) -> None:
    """Raise ArtifactError for the first parameter, or buffer of a table, that was not in the checkpoint.

    For a class other than the checkpoint's `architectures` (a new head on the same body) only compressed matrices are
    checked. transformers marks the tensors it loaded or tied; parameters offloaded to disk are on the meta device.
    """
    everything = type(model).__name__ in architectures
    scales = [(name, buffer) for name, buffer in _persistent_buffers(model) if name.endswith(SUFFIXES)]
    for name, parameter in [*model.named_parameters(), *scales]:
        loaded = parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)
        if not loaded and (everything or name.endswith(SUFFIXES)):
            raise ArtifactError(f"The checkpoint lacks the tensor {name}; copy it again, or {_AGAIN}.")


def check_values(name: str, stored: Mapping[str, Tensor], columns: int) -> None:
    """Raise ArtifactError for stored values of the module `name`, which has `columns` inputs, that no writer stores.

    stored: tensors by suffix. Plane codes and exponents may have any value; tensors on the meta device are skipped.
    Outlier columns that do not exist would be read from foreign memory.
    """
    for suffix, tensor in stored.items():
        if tensor.is_meta:
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{name}.{suffix} holds values that are not finite; copy it again, or {_AGAIN}.")
        if suffix == "weight_column_ids" and not are_columns(tensor, columns):
            raise ArtifactError(
                f"{name}.{suffix} names columns that are not there, or not in order; copy it again, or {_AGAIN}."
            )


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    stored = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def place_tables(model: Any, tables: Mapping[str, TableLayout], dtype: torch.dtype | None) -> None:
    """Turn the listed modules of a model on meta, and the modules tied to them, into empty tables.

    A model of another class than the checkpoint's may lack a listed module: a body has no head. Raises ArtifactError
    for a module that does not fit.
    """
    ties = Ties(model)
    find = find_module if type(model).__name__ in (model.config.architectures or ()) else try_find_module
    for name, layout in tables.items():
        if (location := find(model, name)) is None:
            continue
        path = location[0]
        members = ties.group(path)
        for member in members:
            _check(model.get_submodule(member), name, layout.shape, type(model).__name__)
        stored = hold_table(model.get_submodule(path), layout, dtype)
        for member in members:
            if member != path:
                hold_table(model.get_submodule(member), layout, dtype).connect(stored)
        ties.rename(members, "weight", *_tied_parameters(layout))


def _tied_parameters(layout: TableLayout) -> list[str]:
    """Suffixes of the parameters that tied modules share; the scale of 8-bit rows is a buffer."""
    return [CODES] if layout.packed is None else list(layout.tensors())


def connect_tables(model: Any) -> None:
    """Let tied modules read one table after loading: transformers ties parameters, but neither buffers nor what
    kernels read. Then mark embeddings with their dtype, for `model.dtype`.

    Raises ArtifactError if the checkpoint holds codes for a module that the model ties to another, or scales that are
    not finite.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    tables = _tables(model)
    if tables:
        # transformers would copy the stand-in weights, which are NaN, into new embeddings.
        model.resize_token_embeddings = _refuse_resizing
    for name, module in tables.items():
        if isinstance(module, nn.Embedding):
            module.show_dtype()
        source = ties.get(f"{name}.{module.suffixes[0]}")
        if isinstance(module, Int8Table) and source is None:
            if SCALE in module._non_persistent_buffers_set:
                raise ArtifactError(
                    f"The checkpoint holds {name}.{CODES}, which its config.json ties to another table; quantize the "
                    "model again."
                )
            check_values(name, {SCALE: module.weight_int8_scale}, module.weight.shape[1])
        if source is not None:
            module.connect(model.get_submodule(source.rpartition(".")[0]))


def restore_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every table back into the module it was made from, in `dtype`, and restore the ties.

    Raises ArtifactError if one is offloaded to disk.
    """
    ties, tables = Ties(model), _tables(model)
    dense: dict[int, nn.Parameter] = {}
    for name, module in tables.items():
        codes = module.get_parameter(module.suffixes[0])
        if codes.is_meta:
            raise ArtifactError(f"{name} is offloaded to disk; load the model without offloading to dequantize it.")
        if id(codes) not in dense:
            dense[id(codes)] = nn.Parameter(module.decode().to(dtype))
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, module in tables.items():
        alike.setdefault(module.suffixes, []).append(name)
        drop_table(module, dense[id(module.get_parameter(module.suffixes[0]))])
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            bias.data = bias.data.to(dtype)
    for (first, *others), names in alike.items():
        ties.rename(names, first, "weight")
        for suffix in others:
            ties.rename(names, suffix)
    model.__dict__.pop("resize_token_embeddings", None)


def _refuse_resizing(*_: Any, **__: Any) -> NoReturn:
    raise ArtifactError("Compressed embeddings cannot be resized; call the model's dequantize() first.")


def _tables(model: nn.Module) -> dict[str, Table]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Table)}


def _check(module: Any, name: str, shape: tuple[int, ...], model: str) -> None:
    if not can_hold_table(module):
        raise ArtifactError(
            f"{name} is listed as a table, but is a {type(module).__name__} in {model}; load the checkpoint with the "
            "model class it was made from."
        )
    if tuple(module.weight.shape) != shape:
        sizes, listed = (" x ".join(map(str, sides)) for sides in (module.weight.shape, shape))
        raise ArtifactError(
            f"{name} is {sizes} by the model's sizes in config.json, but {listed} by its quantization_config; quantize "
            "the model again."
        )
