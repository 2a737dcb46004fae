"""The memory of a compressed model, and the energy of one token by a hardware model.

Energy is modelled from a table of unit costs. Time is never modelled; `shiftadd benchmark` measures it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from shiftadd_cli.allocation.cost_table import TABLE_FORMAT, CostTable, MeasuredCost
from shiftadd_cli.artifact.format import ArtifactFormat
from shiftadd_cli.artifact.shards import TensorShape, nbytes
from shiftadd_cli.bcq.choices import ALL_CHOICES
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.report import operations
from shiftadd_cli.report.operations import WAYS, Counts, Way
from shiftadd_cli.report.unit_costs import UnitCosts
from shiftadd_cli.source.linear import linear_sizes

# Names for the tensors of a compressed layer.
_PARTS = {
    "weight_codes": "planes",
    "weight_exponents": "scales",
    "weight_scales": "scales",
    "weight_row_scale": "row scales",
    "weight_offset": "offsets",
    "weight_signs": "signs of the rotation",
    "weight_columns": "outlier columns",
    "weight_column_ids": "outlier columns",
}
EMBEDDINGS, KEPT = "embeddings", "kept as they were"


@dataclass(frozen=True)
class WayCost:
    """One way of computing: operations by name, and picojoules for one token."""

    way: Way
    counts: dict[str, int]
    arithmetic: float
    on_chip: float
    dram: float

    @property
    def total(self) -> float:
        return self.arithmetic + self.on_chip + self.dram


@dataclass(frozen=True)
class Cost:
    """Costs of a checkpoint.

    Attributes:
        parts: stored bytes by kind of tensor; dense_bytes: size of all parameters in 16 bits.
        layers: costs of the compressed layers alone; model: costs including the head and all other multiplications.
            Every way computes these as they are stored here, except fp16, which stores everything in 16 bits.
        batch: tokens that share one read of the weights; unit_costs: name of the table.
    """

    parts: dict[str, int]
    dense_bytes: int
    batch: int
    unit_costs: str
    layers: tuple[WayCost, ...]
    model: tuple[WayCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """The costs as JSON types; energies are in picojoules for one token."""

        def plain(costs: tuple[WayCost, ...]) -> dict[str, Any]:
            return {
                cost.way: {
                    "operations": cost.counts,
                    "arithmetic_pj": cost.arithmetic,
                    "on_chip_pj": cost.on_chip,
                    "dram_pj": cost.dram,
                    "total_pj": cost.total,
                }
                for cost in costs
            }

        return {
            "stored_bytes": self.parts | {"total": sum(self.parts.values())},
            "dense_bytes": self.dense_bytes,
            "unit_costs": self.unit_costs,
            "batch": self.batch,
            "layers": plain(self.layers),
            "model": plain(self.model),
        }


def model_cost(
    model: nn.Module,
    form: ArtifactFormat,
    tensors: Mapping[str, TensorShape],
    units: UnitCosts,
    *,
    batch: int = 1,
) -> Cost:
    """Costs of a checkpoint, from headers alone.

    model: the dense model on meta; form: of the checkpoint; tensors: all stored tensors; batch: tokens that share one
    read of the weights, above 0.
    """
    layers: dict[Way, Counts] = {way: Counter() for way in WAYS}
    for layout in form.modules.values():
        for way in WAYS:
            layers[way].update(layer_counts(layout, way))
    others, others_dense = _other_counts(model, form, tensors)
    totals = {way: counts + (others_dense if way == "fp16" else others) for way, counts in layers.items()}
    return Cost(
        parts=stored_parts(form, tensors),
        dense_bytes=2 * sum(parameter.numel() for parameter in model.parameters()),
        batch=batch,
        unit_costs=units.name,
        layers=tuple(_priced(way, counts, units, batch) for way, counts in layers.items()),
        model=tuple(_priced(way, counts, units, batch) for way, counts in totals.items()),
    )


def layer_counts(layout: PackedLayout, way: Way) -> Counts:
    """Operations of one token in one compressed layer, or in the same layer stored in another way."""
    rows, columns = layout.rows, layout.columns
    if way == "fp16":
        return operations.dense(rows, columns)
    if way == "int8":
        return operations.int8(rows, columns)
    if way == "int4":
        return operations.int4(rows, columns)
    return operations.compressed(layout, tables=way == "look-ups")


def stored_parts(form: ArtifactFormat, tensors: Mapping[str, TensorShape]) -> dict[str, int]:
    """Bytes by kind of tensor, for the kinds that the checkpoint has."""
    parts: Counter[str] = Counter()
    for name, shape in tensors.items():
        module, _, suffix = name.rpartition(".")
        if module in form.modules and suffix in _PARTS:
            part = _PARTS[suffix]
        else:
            part = EMBEDDINGS if module in form.tables and suffix in form.tables[module].tensors() else KEPT
        parts[part] += nbytes(shape)
    order = [*dict.fromkeys(_PARTS.values()), EMBEDDINGS, KEPT]
    return {part: parts[part] for part in order if parts[part]}


def energy_table(layouts: Mapping[str, PackedLayout], units: UnitCosts, *, batch: int = 1) -> CostTable:
    """Modelled energy in nJ a token of every layer shape in every form it can take, for `allocate-bits --cost energy`.

    Layers of planes are computed in the cheaper of the two ways.
    """
    rows = []
    # Layouts of one shape differ only in primitive and bits.
    by_shape = {(layout.rows, layout.columns): layout for layout in layouts.values()}
    for shape, alike in by_shape.items():
        for choice in ALL_CHOICES:
            layout = replace(alike, format=alike.format.at(choice))
            counts = [layer_counts(layout, way) for way in ("additions", "look-ups")]
            cheapest = min(_priced("additions", count, units, batch).total for count in counts)
            rows.append(MeasuredCost(shape=shape, bits=choice, cost=float(f"{cheapest / 1000:.6g}")))
    return CostTable(format=TABLE_FORMAT, version=1, cost="energy", unit="nJ", measured=tuple(rows))


def _other_counts(model: nn.Module, form: ArtifactFormat, tensors: Mapping[str, TensorShape]) -> tuple[Counts, Counts]:
    """Operations outside the compressed layers: with tensors as stored, and with everything in 16 bits.

    A head of planes looks up, all other linear layers multiply, an embedding gives one row of its matrix, and other
    tensors are read once.
    """
    stored: Counts = Counter()
    dense: Counts = Counter()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    packed = {f"{name}.weight" for name in form.modules}
    multiplied: set[int] = set()
    looked_up: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding):
            looked_up.add(id(weight))
        if (sizes := linear_sizes(module)) is not None and name not in form.modules:
            # A head that is tied to the embedding is stored under the embedding's name.
            multiplied.add(id(weight))
            rows, columns = sizes[:2]
            dense.update(operations.dense(rows, columns))
            stored.update(_product_counts(names.get(id(weight), []), rows, columns, form, tensors))
    for parameter in model.parameters():
        aliases = names[id(parameter)]
        if packed.intersection(aliases):
            continue
        table = _table_of(aliases, form)
        nbytes_stored = _stored_bytes(aliases, tensors) if table is None else table.nbytes
        if id(parameter) in looked_up:
            dense.update(dram_byte=2 * parameter.shape[-1])
            stored.update(dram_byte=nbytes_stored // parameter.shape[0])
        elif id(parameter) not in multiplied:
            dense.update(dram_byte=2 * parameter.numel())
            stored.update(dram_byte=nbytes_stored)
    return stored, dense


def _product_counts(
    aliases: Sequence[str], rows: int, columns: int, form: ArtifactFormat, tensors: Mapping[str, TensorShape]
) -> Counts:
    """Counts of a linear layer outside `form.modules`, whose weight has these names."""
    table = _table_of(aliases, form)
    if table is not None and table.packed is not None:
        return operations.compressed(table.packed, tables=True)
    if table is not None:
        return operations.table_of_rows(rows, columns, table.nbytes)
    counts = operations.dense(rows, columns)
    counts["dram_byte"] = _stored_bytes(aliases, tensors)
    return counts


def _table_of(aliases: Sequence[str], form: ArtifactFormat) -> TableLayout | None:
    """The table that a parameter with these names is stored as."""
    modules = (name.removesuffix(".weight") for name in aliases)
    return next((form.tables[module] for module in modules if module in form.tables), None)


def _stored_bytes(aliases: Sequence[str], tensors: Mapping[str, TensorShape]) -> int:
    """Stored bytes of an uncompressed parameter, which is stored under one of its names."""
    return next((nbytes(tensors[name]) for name in aliases if name in tensors), 0)


def _priced(way: Way, counts: Counts, units: UnitCosts, batch: int) -> WayCost:
    moved = ("sram_16_bits", "dram_byte")
    return WayCost(
        way=way,
        counts={name: counts[name] for name in units.operations if counts[name]},
        arithmetic=units.energy({name: count for name, count in counts.items() if name not in moved}),
        on_chip=units.energy({"sram_16_bits": counts["sram_16_bits"]}),
        dram=units.energy({"dram_byte": counts["dram_byte"]}) / batch,
    )
