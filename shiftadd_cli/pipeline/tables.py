"""Embeddings, heads (output heads and classifiers) and patch embeddings, stored as 8-bit rows or compressed matrices:
planning and storing them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shiftadd_cli.artifact.shards import TensorShape
from shiftadd_cli.bcq.choices import ROWS, Choice
from shiftadd_cli.bcq.int8 import CODES, SCALE, decode_table, encode_table
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.primitives import PRIMITIVES
from shiftadd_cli.bcq.solver import Solution, quantize_matrices
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.context import Context
from shiftadd_cli.recipe import UNCHANGED, Recipe
from shiftadd_cli.report.schema import TableReport
from shiftadd_cli.runtime.table import can_hold_table, hold_table
from shiftadd_cli.source import Structure
from shiftadd_cli.source.structure import CLASSIFIER, PATCH_EMBEDDING, matching_pattern
from shiftadd_cli.source.vision import IMAGE_INPUT

# A tied matrix is read by the head, whose error counts in the second moment of its inputs, and by the embedding, whose
# error counts alike in all directions. This is the weight of the latter, relative to the mean diagonal of the moment.
_EMBEDDING_WEIGHT = 0.3
# Weights that are solved or decoded at a time: a large vocabulary in float32, several times over, takes gigabytes.
TILE_WEIGHTS = 1 << 23
_PROBE_ROWS = 4


@dataclass(frozen=True)
class PlannedTable:
    """A weight to be stored under the first of `modules`, which share it. `reader` is the head or the convolution among
    them, whose inputs decide what an error of the weight costs; None for an embedding alone."""

    modules: tuple[str, ...]
    layout: TableLayout
    reader: str | None = None

    @property
    def name(self) -> str:
        return self.modules[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def form(self) -> str:
        return self.layout.form

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest form that may be chosen, 8-bit rows."""
        return TableLayout(self.shape).nbytes

    def weight(self, model: nn.Module) -> Tensor:
        """The weight in a model, without a gradient."""
        return model.get_parameter(f"{self.name}.weight").detach()

    def tensors(self) -> dict[str, TensorShape]:
        """Shape and dtype of the stored tensors, by full name."""
        return {f"{self.name}.{suffix}": shape for suffix, shape in self.layout.tensors().items()}

    def at(self, choice: Choice, recipe: Recipe) -> PlannedTable:
        """The same weight in another form: `ROWS`, or a choice of planes."""
        return replace(self, layout=TableLayout(self.shape, None if choice == ROWS else recipe.at(choice)))

    def options(self, recipe: Recipe, moment: Tensor | None) -> SolverOptions:
        """The options of the solver for a compressed matrix, and this moment of its reader's inputs, if any."""
        assert self.layout.format is not None, "8-bit rows are rounded, not solved"
        options = recipe.solver_options.replaced(format=self.layout.format, asymmetric=0.0, drift=0.0)
        if moment is None:
            return options.without_data()
        return options.replaced(weight_error=max(options.weight_error, self._embedding_weight))

    def objective(self, moment: Tensor | None) -> Tensor:
        """The quadratic form that errors of the rows cost, up to a factor, float32 `[columns, columns]`."""
        identity = torch.eye(self.layout.columns)
        if moment is None:
            return identity
        return moment.cpu() / moment.diagonal().mean().cpu() + self._embedding_weight * identity

    @property
    def _embedding_weight(self) -> float:
        return _EMBEDDING_WEIGHT if self.reader is not None and len(self.modules) > 1 else 0.0


def plan_tables(
    model: Any, structure: Structure, recipe: Recipe, bits: Mapping[str, Choice] | None = None
) -> tuple[tuple[PlannedTable, ...], tuple[tuple[str, str], ...]]:
    """Tables for the input embedding and output head of a model on meta, or for the patch embedding and classifier of a
    model that reads images, and the modules that stay unquantized.

    The latter are `structure.kept` without the tables. An embedding or head that cannot be a table gets the reason: its
    forward uses the weight in a custom way, its weight is tied to a module that cannot be a table, or a pattern of
    `skip` matches it. With `embedding_bits` 16 there are no tables.

    bits: forms that a bit plan gives to tables, by name; the others have the form of the recipe.
    """
    if recipe.embedding_bits == UNCHANGED:
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
            shape = tuple(model.get_parameter(weight).shape)
            readers = [name for name in group if not isinstance(model.get_submodule(name), nn.Embedding)]
            table = PlannedTable(group, TableLayout(shape), readers[0] if readers else None)
            tables[group[0]] = table.at((bits or {}).get(table.name, recipe.table_choice), recipe)
    planned = {module for table in tables.values() for module in table.modules}
    kept = tuple(
        (name, f"{reason}, {refused[name]}" if name in refused else reason)
        for name, reason in structure.kept
        if name not in planned
    )
    return tuple(tables.values()), kept


def _ends(model: Any, structure: Structure) -> list[str]:
    """Names of the input embedding and the output head, or of the patch embedding and the classifier."""
    if model.main_input_name == IMAGE_INPUT:
        return [name for name, reason in structure.kept if reason in (PATCH_EMBEDDING, CLASSIFIER)]
    names = {id(module): name for name, module in model.named_modules()}
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    return list(dict.fromkeys(names[id(module)] for module in ends if id(module) in names))


def encode_weight(
    table: PlannedTable, weight: Tensor, recipe: Recipe, moment: Tensor | None, context: Context
) -> tuple[dict[str, Tensor], float | None]:
    """The stored tensors of a table by suffix, and E‖(W − Ŵ)x‖² / E‖Wx‖² over the inputs of its reader, if known. The
    processes of a team share the work.

    weight: of the table's shape. moment: of these inputs, see `table_moment`; None to compress the weight alone. Raises
    NumericalError, naming the module, if a weight is not finite.
    """
    if table.layout.packed is None:
        codes, scale = encode_table(weight, table.name)
        return {CODES: codes, SCALE: scale}, None
    options = table.options(recipe, moment)
    if moment is not None:
        moment = moment.to(context.device)
    spans = _spans(table.layout.packed, options)
    names, solutions, signals = [f"rows {rows.start}" for rows in spans], [], []
    # One tile after another: a vocabulary takes longer than a block.
    for rows, _ in zip(spans, context.progress(names, f"Solving {table.name} as {table.form}"), strict=True):
        tile = weight[rows].flatten(1).to(context.device).float()
        solutions += quantize_matrices([tile], [table.name], moment, options, team=context.team)
        signals.append(0.0 if moment is None else float(((tile @ moment) * tile).sum(dtype=torch.float64)))
    return _joined(solutions, table.layout.packed), _mean_error(solutions, signals)


def _spans(layout: PackedLayout, options: SolverOptions) -> list[slice]:
    """The rows of the matrix in tiles that can be solved separately."""
    together = None if layout.outliers else PRIMITIVES[layout.format.primitive].rows_together(options.format)
    if together is None:
        return [slice(0, layout.rows)]
    height = together * max(1, TILE_WEIGHTS // (together * layout.columns))
    return [slice(start, min(start + height, layout.rows)) for start in range(0, layout.rows, height)]


def _joined(solutions: Sequence[Solution], layout: PackedLayout) -> dict[str, Tensor]:
    """The stored tensors of a matrix from those of its tiles, which share the signs of the rotation."""
    first = solutions[0].weight.tensors
    return {
        suffix: torch.cat([solution.weight.tensors[suffix] for solution in solutions])
        if shape != tuple(first[suffix].shape)
        else first[suffix]
        for suffix, (shape, _) in layout.tensors().items()
    }


def _mean_error(solutions: Sequence[Solution], signals: Sequence[float]) -> float | None:
    """The relative output error of a matrix from those of its tiles and E‖Wx‖² of each."""
    if any(solution.output_error is None for solution in solutions) or not sum(signals):
        return None
    pairs = zip(solutions, signals, strict=True)
    return sum((solution.output_error or 0.0) * signal for solution, signal in pairs) / sum(signals)


def place_weight(table: PlannedTable, model: nn.Module, tensors: Mapping[str, Tensor]) -> float:
    """Replace the weight in memory by what the stored tensors stand for.

    Returns ‖W − Ŵ‖² / ‖W‖², where W is its previous value; 0 for a weight of zeros. The sums are float64.
    """
    weight = table.weight(model)
    error = size = 0.0
    for rows, decoded in decoded_tiles(table.layout, tensors):
        before = weight[rows].flatten(1).float()
        error += float((before - decoded.to(before)).square_().sum(dtype=torch.float64))
        size += float(before.square_().sum(dtype=torch.float64))
        # In place, so that tied modules see it, and calibration uses the same values as the artifact.
        weight[rows] = decoded.view(weight[rows].shape).to(weight)
    return error / size if size else 0.0


def decoded_tiles(layout: TableLayout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a table in tiles, float32 `[rows, columns]`."""
    height = max(1, TILE_WEIGHTS // layout.columns)
    if layout.packed is not None:
        packed = QuantizedWeight(layout.packed, dict(tensors))
        for rows, tile in packed.tiles(height):
            yield rows, packed.completed(tile, rows)
        return
    for start in range(0, layout.rows, height):
        rows = slice(start, min(start + height, layout.rows))
        yield rows, decode_table(tensors[CODES][rows], tensors[SCALE][rows]).flatten(1)


def by_suffix(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors of a module by suffix, from their full names."""
    return {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}


def table_report(table: PlannedTable, weight_error: float, output_error: float | None) -> TableReport:
    """The entry of report.json."""
    layout = table.layout
    return TableReport(
        modules=list(table.modules),
        rows=layout.rows,
        columns=layout.columns,
        primitive=layout.primitive,
        bits=layout.bits,
        bits_per_weight=layout.bits_per_weight,
        weight_error=weight_error,
        output_error=output_error,
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
            dense.weight.copy_(decode_table(codes, scale))
            table = hold_table(copy.deepcopy(dense), TableLayout(tuple(dense.weight.shape)))
            table.get_parameter(CODES).copy_(codes)
            table.get_buffer(SCALE).copy_(scale)
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
