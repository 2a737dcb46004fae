"""What a compressed model takes in memory, and what a token takes in energy by a model of the hardware.

Energy is modelled, from a table of unit costs; time never is: `shiftadd benchmark` measures it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from shiftadd_cli.allocation.cost_table import TABLE_FORMAT, CostTable, MeasuredCost
from shiftadd_cli.artifact.shards import TensorShape, nbytes
from shiftadd_cli.bcq.int8 import SUFFIXES as TABLE_SUFFIXES
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.report import operations
from shiftadd_cli.report.operations import WAYS, Counts, Way
from shiftadd_cli.report.unit_costs import UnitCosts
from shiftadd_cli.source.structure import linear_sizes

# What the tensors of a compressed layer are called.
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
ROWS, KEPT = "8-bit rows", "kept as they were"


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
        parts: bytes stored by kind of tensor; dense_bytes: of all parameters in 16 bits.
        layers: of the compressed layers alone; model: with the head and what else multiplies, computed by every way as
            it is stored here, but for fp16, which stores all in 16 bits.
        batch: tokens that share a read of the weights; unit_costs: name of the table.
    """

    parts: dict[str, int]
    dense_bytes: int
    batch: int
    unit_costs: str
    layers: tuple[WayCost, ...]
    model: tuple[WayCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON; energies are in picojoules for one token."""

        def plain(costs: tuple[WayCost, ...]) -> dict[str, Any]:
            return {
                each.way: {
                    "operations": each.counts,
                    "arithmetic_pj": each.arithmetic,
                    "on_chip_pj": each.on_chip,
                    "dram_pj": each.dram,
                    "total_pj": each.total,
                }
                for each in costs
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
    layouts: Mapping[str, PackedLayout],
    tensors: Mapping[str, TensorShape],
    units: UnitCosts,
    *,
    batch: int = 1,
) -> Cost:
    """Costs of a checkpoint from headers alone.

    model: the dense model on meta; layouts: of the compressed layers by name; tensors: all that is stored; batch:
    tokens that share one read of the weights, above 0.
    """
    layers: dict[Way, Counts] = {way: Counter() for way in WAYS}
    for layout in layouts.values():
        for way in WAYS:
            layers[way].update(layer_counts(layout, way))
    others, others_dense = _other_counts(model, layouts, tensors)
    whole = {way: counts + (others_dense if way == "fp16" else others) for way, counts in layers.items()}
    return Cost(
        parts=stored_parts(layouts, tensors),
        dense_bytes=2 * sum(each.numel() for each in model.parameters()),
        batch=batch,
        unit_costs=units.name,
        layers=tuple(_priced(way, counts, units, batch) for way, counts in layers.items()),
        model=tuple(_priced(way, counts, units, batch) for way, counts in whole.items()),
    )


def layer_counts(layout: PackedLayout, way: Way) -> Counts:
    """Operations of one token in one compressed layer, or in the same layer held in another way."""
    rows, columns = layout.grid.rows, layout.grid.columns
    if way == "fp16":
        return operations.dense(rows, columns)
    if way == "int8":
        return operations.int8(rows, columns)
    if way == "int4":
        return operations.int4(rows, columns)
    return operations.planes(layout, tables=way == "look-ups")


def stored_parts(layouts: Mapping[str, PackedLayout], tensors: Mapping[str, TensorShape]) -> dict[str, int]:
    """Bytes by kind of tensor, the kinds that are there."""
    parts: Counter[str] = Counter()
    for name, shape in tensors.items():
        module, _, suffix = name.rpartition(".")
        if module in layouts and suffix in _PARTS:
            parts[_PARTS[suffix]] += nbytes(shape)
        else:
            parts[ROWS if suffix in TABLE_SUFFIXES else KEPT] += nbytes(shape)
    order = [*dict.fromkeys(_PARTS.values()), ROWS, KEPT]
    return {part: parts[part] for part in order if parts[part]}


def energy_table(layouts: Mapping[str, PackedLayout], units: UnitCosts, *, batch: int = 1) -> CostTable:
    """Modelled energy in nanojoules a token of every shape at 1 to 8 bits, for `allocate-bits --cost energy`.

    Each layer is computed in the cheaper of the two ways there are for planes. Layouts of one shape are taken to be
    alike but for their bits.
    """
    rows = []
    for shape, layout in {(each.grid.rows, each.grid.columns): each for each in layouts.values()}.items():
        for bits in range(1, 9):
            counts = [layer_counts(replace(layout, bits=bits), way) for way in ("additions", "look-ups")]
            cheapest = min(_priced("additions", each, units, batch).total for each in counts)
            rows.append(MeasuredCost(shape=shape, bits=bits, cost=float(f"{cheapest / 1000:.6g}")))
    return CostTable(format=TABLE_FORMAT, version=1, cost="energy", unit="nJ", measured=tuple(rows))


def _other_counts(
    model: nn.Module, layouts: Mapping[str, PackedLayout], tensors: Mapping[str, TensorShape]
) -> tuple[Counts, Counts]:
    """Operations outside the compressed layers: as stored, and with everything in 16 bits.

    Every other linear layer multiplies; an embedding gives one row of its matrix; the rest is read once.
    """
    stored, dense = Counts(), Counts()
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    looked_up = {names[id(module.weight)]: module for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied: set[str] = set()
    for name, module in model.named_modules():
        sizes = linear_sizes(module)
        if sizes is None or name in layouts:
            continue
        # A head may be tied to the embedding, and is stored under its name.
        weight = names[id(module.get_parameter("weight"))]
        multiplied.add(weight)
        rows, columns = sizes[:2]
        dense.update(operations.dense(rows, columns))
        stored.update(_stored_counts(weight, rows, columns, tensors))
    packed = {f"{name}.weight" for name in layouts}
    for name, parameter in parameters.items():
        if name in packed:
            continue
        if name in looked_up:
            row = parameter.shape[1]
            dense.update(dram_byte=2 * row)
            stored.update(
                dram_byte=row + 2 if f"{name}_int8" in tensors else nbytes(tensors[name]) // parameter.shape[0]
            )
        elif name not in multiplied:
            dense.update(dram_byte=2 * parameter.numel())
            stored.update(dram_byte=nbytes(tensors[name]))
    return stored, dense


def _stored_counts(weight: str, rows: int, columns: int, tensors: Mapping[str, TensorShape]) -> Counts:
    if f"{weight}_int8" in tensors:
        return operations.table_of_rows(
            rows, columns, sum(nbytes(tensors[f"{weight}{end}"]) for end in ("_int8", "_int8_scale"))
        )
    counts = operations.dense(rows, columns)
    counts["dram_byte"] = nbytes(tensors[weight])
    return counts


def _priced(way: Way, counts: Counts, units: UnitCosts, batch: int) -> WayCost:
    moved = ("sram_16_bits", "dram_byte")
    return WayCost(
        way=way,
        counts={name: counts[name] for name in units.operations if counts[name]},
        arithmetic=units.energy({name: count for name, count in counts.items() if name not in moved}),
        on_chip=units.energy({"sram_16_bits": counts["sram_16_bits"]}),
        dram=units.energy({"dram_byte": counts["dram_byte"]}) / batch,
    )
