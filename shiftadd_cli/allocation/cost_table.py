"""Costs of layers in a unit other than bytes (milliseconds, millijoules), measured by the user, and budgets of them.

A cost table is a JSON file with the cost of one token's pass through a layer, either per weight,

    {"format": "shiftadd cost table", "version": 1, "cost": "latency", "unit": "ms",
     "per_weight": {"2": 1.1e-7, "3": 1.5e-7, "4": 2.0e-7}}

or measured for layers of given shapes, `[out, in]`:

    {"format": "shiftadd cost table", "version": 1, "cost": "energy", "unit": "mJ",
     "measured": [{"shape": [576, 576], "bits": 2, "cost": 0.031}, ...]}

Shift layers and trellis-coded planes have a word, such as "shift2-4", in place of a number of bits. The costs of all
layers are summed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError, model_validator

from shiftadd_cli.allocation.budget import Budget
from shiftadd_cli.allocation.plan_file import Kind
from shiftadd_cli.allocation.solve import LayerOptions
from shiftadd_cli.bcq.choices import Choice, choice_words
from shiftadd_cli.errors import AllocationError, first_fault
from shiftadd_cli.storage.file_part import FilePart

CostKind = Literal["bits", "latency", "energy"]
Shapes = Mapping[str, tuple[int, int]]

TABLE_FORMAT: Final = "shiftadd cost table"
_MAX_BYTES = 10_000_000
# The integer program counts in whole steps; the budget has this many.
_STEPS = 2**40
# A budget counts as met within a millionth, which is finer than any measured cost. The program's rounding, and a number
# copied from a message, must not matter.
_TOLERANCE = 1e-6

Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Width = Annotated[int, Field(ge=1)]


class MeasuredCost(FilePart):
    """The cost of a layer of this shape at these bits."""

    shape: tuple[Width, Width]
    bits: Kind
    cost: Cost


class CostTable(FilePart):
    """See the module; exactly one of `per_weight` and `measured` is given."""

    format: Literal["shiftadd cost table"]
    version: Literal[1]
    cost: Literal["latency", "energy"]
    unit: Annotated[str, Field(min_length=1, max_length=40)]
    per_weight: dict[Kind, Cost] | None = None
    measured: tuple[MeasuredCost, ...] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> CostTable:
        if (self.per_weight is None) == (self.measured is None):
            raise ValueError("give one of per_weight and measured")
        seen: set[tuple[tuple[int, int], Choice]] = set()
        for entry in self.measured or ():
            if (entry.shape, entry.bits) in seen:
                raise ValueError(f"shape {list(entry.shape)} at {choice_words(entry.bits)} is given twice")
            seen.add((entry.shape, entry.bits))
        return self

    def of(self, name: str, shape: tuple[int, int], bits: Choice) -> float:
        """Cost of the layer `name` of shape `[out, in]`. Raises AllocationError if it is missing from the table."""
        if self.per_weight is not None:
            if bits in self.per_weight:
                return self.per_weight[bits] * shape[0] * shape[1]
        else:
            for entry in self.measured or ():
                if (entry.shape, entry.bits) == (shape, bits):
                    return entry.cost
        missing = choice_words(bits)
        if self.per_weight is None:
            missing = f"the shape {shape[0]} x {shape[1]} at {missing}"
        raise AllocationError(
            f"The cost table has no {self.cost} of {missing}, which {name} may get; add it, or leave these bits out "
            "with `candidates`."
        )


@dataclass(frozen=True)
class CostLimit:
    """A budget: the total cost of all quantized layers is at most `limit`, in the unit of `table`."""

    table: CostTable
    limit: float

    @property
    def text(self) -> str:
        return f"{self.limit:g} {self.table.unit} of {self.table.cost}"

    @property
    def steps(self) -> int:
        """The budget in steps of the integer program; see `priced`."""
        return _STEPS

    def spent(self, bits: Mapping[str, Choice], shapes: Shapes) -> float:
        """Cost of layers with these bits."""
        return sum(self.table.of(name, shapes[name], choice) for name, choice in bits.items())

    def check(self, allowed: Mapping[str, tuple[Choice, ...]], shapes: Shapes) -> None:
        """Check that some choice of the allowed bits meets the limit, and that the table has all of them.

        Raises AllocationError otherwise.
        """
        costs = [[self.table.of(name, shapes[name], bits) for bits in choices] for name, choices in allowed.items()]
        low, high = (sum(map(choose, costs)) for choose in (min, max))
        if low > self.limit * (1 + _TOLERANCE):
            raise AllocationError(
                f"A budget of {self.text} cannot be met: the allowed bits cost from {low:.7g} to {high:.7g} "
                f"{self.table.unit}; raise `max_cost`, or allow other bits with `candidates`."
            )

    def priced(self, layer: LayerOptions, shape: tuple[int, int]) -> LayerOptions:
        """The same choices with steps of this budget in place of bytes. Costs over twice the budget are clipped."""
        costs = {bits: self.table.of(layer.name, shape, bits) for bits in layer.bytes}
        return LayerOptions(
            layer.name,
            {bits: round(min(cost / self.limit, 2.0) / (1 + 2 * _TOLERANCE) * _STEPS) for bits, cost in costs.items()},
            layer.costs,
        )


def parse_budget(
    average_bits: float | None,
    target_size: str | None,
    max_divergence: float | None = None,
    cost: CostKind = "bits",
    cost_table: Path | None = None,
    max_cost: float | None = None,
    average_file_bits: float | None = None,
) -> Budget | CostLimit:
    """The budget from the command-line options. Raises AllocationError if they do not fit together."""
    if cost == "bits":
        if cost_table is not None or max_cost is not None:
            raise AllocationError("`cost_table` and `max_cost` are for `cost` latency or energy; give one of these.")
        return Budget.parse(average_bits, target_size, max_divergence, average_file_bits)
    if any(option is not None for option in (average_bits, average_file_bits, target_size, max_divergence)):
        raise AllocationError(
            "`avg_bits`, `avg_file_bits`, `target_size` and `max_divergence` are for `cost=bits`; give `max_cost` for "
            f"`cost` {cost}."
        )
    if cost_table is None or max_cost is None:
        raise AllocationError(
            f"`cost` {cost} needs `cost_table`, a file of layer costs, and `max_cost` in its unit; give both."
        )
    if not 0 < max_cost < float("inf"):
        raise AllocationError(f"`max_cost` {max_cost} is not valid; give a number above 0.")
    table = load_cost_table(cost_table)
    if table.cost != cost:
        raise AllocationError(f"Cost table {cost_table} is of {table.cost}; use it with `cost` {table.cost}.")
    return CostLimit(table, max_cost)


def load_cost_table(path: Path) -> CostTable:
    """Read a cost table. Raises AllocationError with one sentence if it is unreadable or not a cost table."""
    if not path.is_file():
        raise AllocationError(f"There is no cost table {path}; give the path of a JSON file.")
    if path.stat().st_size > _MAX_BYTES:
        raise AllocationError(
            f"Cost table {path} has more than {_MAX_BYTES:,} bytes, too many for a cost table; create it again."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise AllocationError(
            f"Cost table {path} is not valid JSON ({' '.join(str(failure).split())}); fix it."
        ) from None
    if not isinstance(values, dict) or values.get("format") != TABLE_FORMAT:
        raise AllocationError(
            f'{path} is not a cost table; it must begin with {{"format": "{TABLE_FORMAT}", "version": 1.'
        )
    try:
        return CostTable.model_validate(values)
    except ValidationError as failure:
        location, message = first_fault(failure)
        raise AllocationError(f"{', '.join((f'Cost table {path}', *location))}: {message}; fix it.") from None
