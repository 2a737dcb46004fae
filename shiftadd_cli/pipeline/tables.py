"""Tables of 8-bit rows for embeddings, output heads and patch embeddings: planning and storing them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.artifact.shards import TensorShape
from shiftadd_cli.bcq.int8 import CODES, SCALE, decode_table_into, encode_table, table_bytes, table_tensors
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.report.schema import TableReport
from shiftadd_cli.runtime.table import can_hold_table, hold_table
from shiftadd_cli.source import Structure
from shiftadd_cli.source.structure import PATCH_EMBEDDING, matching_pattern
from shiftadd_cli.source.vision import IMAGE_INPUT

_PROBE_ROWS = 4


@dataclass(frozen=True)
class PlannedTable:
    """A weight of `shape` to be stored as 8-bit rows under the first of `modules`, which share it."""

    modules: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.modules[0]

    @property
    def nbytes(self) -> int:
        return table_bytes(*self.shape)

    def tensors(self) -> dict[str, TensorShape]:
        """Shape and dtype of the stored tensors, by full name."""
        return {f"{self.name}.{suffix}": shape for suffix, shape in table_tensors(*self.shape).items()}


def plan_tables(
    model: Any, structure: Structure, recipe: Recipe
) -> tuple[tuple[PlannedTable, ...], tuple[tuple[str, str], ...]]:
    """Tables for the input embedding and output head of a model on meta, or for the patch embedding of a model that
    reads images, and the modules that stay unquantized.

    The latter are `structure.kept` without the tables. An embedding or head that cannot be a table gets the reason: its
    forward uses the weight in a custom way, its weight is tied to a module that cannot be a table, or a pattern of
    `skip` matches it. With `embedding_bits` 16 there are no tables.
    """
    if recipe.embedding_bits == 16:
        return (), structure.kept
    order = list(model.state_dict())
    tables: dict[str, PlannedTable] = {}
    refused: dict[str, str] = {}
    for end in _ends(model, structure):
        weight = f"{end}.weight"
        tied = next((group for group in structure.tied if weight in group), (weight,))
        group = tuple(name.removesuffix(".weight") for name in tied if name in order)
        if reason := _refusal(model, group, recipe.skip):
            refused[end] = reason
        elif group[0] not in tables:
            tables[group[0]] = PlannedTable(group, tuple(model.get_parameter(weight).shape))
    planned = {module for table in tables.values() for module in table.modules}
    kept = tuple(
        (name, f"{reason}, {refused[name]}" if name in refused else reason)
        for name, reason in structure.kept
        if name not in planned
    )
    return tuple(tables.values()), kept


def _ends(model: Any, structure: Structure) -> list[str]:
    """Names of the input embedding and the output head, or of the patch embedding of an image model. The classifier of
    an image model has only a few rows and stays unquantized."""
    if model.main_input_name == IMAGE_INPUT:
        return [name for name, reason in structure.kept if reason == PATCH_EMBEDDING]
    names = {id(module): name for name, module in model.named_modules()}
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return list(dict.fromkeys(names[id(module)] for module in ends if id(module) in names))


def store_table(table: PlannedTable, model: nn.Module, add: Callable[[str, Tensor], None]) -> TableReport:
    """Pass the table's tensors to `add`, and replace the weight in memory, and so its ties, by the decoded one.

    Raises NumericalError, naming the module, if a weight is not finite.
    """
    weight = model.get_parameter(f"{table.name}.weight")
    codes, scale = encode_table(weight.detach(), table.name)
    add(f"{table.name}.{CODES}", codes)
    add(f"{table.name}.{SCALE}", scale)
    with torch.no_grad():
        # In place, so that tied modules see it, and calibration uses the same values as the artifact.
        error = decode_table_into(codes, scale, weight)
    return TableReport(
        modules=list(table.modules),
        rows=table.shape[0],
        columns=math.prod(table.shape[1:]),
        bits_per_weight=8 * table.nbytes / math.prod(table.shape),
        weight_error=error,
    )


def _refusal(model: nn.Module, group: Sequence[str], skip: Sequence[str]) -> str | None:
    for name in group:
        try:
            module = model.get_submodule(name)
        except AttributeError:  # a bare parameter
            return f"tied to {name}"
        if pattern := matching_pattern(name, skip):
            return f"skipped by {pattern}"
        if not can_hold_table(module) or not _reads_by_lookup(module):
            return "with a custom forward" if len(group) == 1 else f"tied to {name}, which has a custom forward"
    return None


def _reads_by_lookup(module: nn.Module) -> bool:
    """Whether an embedding uses its weight only through `nn.Embedding.forward`, so that a table can replace it.

    This is tested by running it, since a subclass may do anything: a copy with a few rows must give equal finite
    outputs as a dense module and as a table.
    """
    if not isinstance(module, nn.Embedding) or type(module).forward is nn.Embedding.forward:
        return True
    dense = _probe(module)
    ids = torch.arange(_PROBE_ROWS).unsqueeze(0)
    with torch.no_grad():
        try:
            codes, scale = encode_table(dense.weight, "probe")
            decode_table_into(codes, scale, dense.weight)
            table = hold_table(copy.deepcopy(dense))
            table.weight_int8.copy_(codes)
            table.weight_int8_scale.copy_(scale)
            expected, actual = dense(ids), table(ids)
        except Exception:  # a class may fail in any way on sizes that it was not made for
            return False
    return bool(torch.isfinite(expected).all()) and torch.equal(expected, actual)


def _probe(module: nn.Embedding) -> nn.Embedding:
    """A float32 copy on the CPU with a few rows, and random numbers in place of its parameters and buffers."""
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module)
    probe.weight = nn.Parameter(torch.empty(_PROBE_ROWS, module.embedding_dim, device="meta"))

    def fill(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.rand(tensor.shape, generator=generator)
        return torch.zeros_like(tensor, device="cpu")

    for submodule in probe.modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            setattr(submodule, name, nn.Parameter(fill(parameter)))
        for name, buffer in submodule.named_buffers(recurse=False):
            setattr(submodule, name, fill(buffer))
    return probe
