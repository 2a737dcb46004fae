"""What layers cost in another unit than bytes (milliseconds, millijoules), as the user measured it, and a budget of it.

A cost table is a JSON file with the cost of one token's pass through a layer, either for every weight,

    {"format": "shiftadd cost table", "version": 1, "cost": "latency", "unit": "ms",
     "per_weight": {"2": 1.1e-7, "3": 1.5e-7, "4": 2.0e-7}}

or for layers of given shapes, `[out, in]`, as they were measured:

    {"format": "shiftadd cost table", "version": 1, "cost": "energy", "unit": "mJ",
     "measured": [{"shape": [576, 576], "bits": 2, "cost": 0.031}, ...]}

Shift layers go by their words, such as "shift2-4", in place of a number of bits. Costs of layers are added up.
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
# The integer program counts in whole steps, this many to the budget.
_STEPS = 2**40
# A budget counts as met within a millionth, less than any cost is known to: the program's rounding, and a number copied
# from a message, must not matter.
_TOLERANCE = 1e-6

Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Width = Annotated[int, Field(ge=1)]


class MeasuredCost(FilePart):
    """What a layer of this shape costs at these bits."""

    shape: tuple[Width, Width]
    bits: Kind
    cost: Cost


class CostTable(FilePart):
    """See the module; one of `per_weight` and `measured` is there."""

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
        for each in self.measured or ():
            if (each.shape, each.bits) in seen:
                raise ValueError(f"shape {list(each.shape)} at {choice_words(each.bits)} is given twice")
            seen.add((each.shape, each.bits))
        return self

    def of(self, name: str, shape: tuple[int, int], bits: Choice) -> float:
        """Cost of the layer `name` of a shape `[out, in]`. Raises AllocationError where the table does not have it."""
        if self.per_weight is not None:
            if bits in self.per_weight:
                return self.per_weight[bits] * shape[0] * shape[1]
        else:
            for each in self.measured or ():
                if (each.shape, each.bits) == (shape, bits):
                    return each.cost
        missing = choice_words(bits)
        if self.per_weight is None:
            missing = f"the shape {shape[0]} x {shape[1]} at {missing}"
        raise AllocationError(
            f"The cost table has no {self.cost} of {missing}, which {name} may get; add it, or leave these bits out "
            "with `candidates`."
        )


@dataclass(frozen=True)
class CostLimit:
    """A budget: the costs of all quantized layers may come to `limit`, in the unit of `table`."""

    table: CostTable
    limit: float

    @property
    def text(self) -> str:
        return f"{self.limit:g} {self.table.unit} of {self.table.cost}"

    @property
    def steps(self) -> int:
        """The budget as the integer program counts; see `priced`."""
        return _STEPS

    def spent(self, bits: Mapping[str, Choice], shapes: Shapes) -> float:
        """Cost of layers with these bits."""
        return sum(self.table.of(name, shapes[name], each) for name, each in bits.items())

    def check(self, allowed: Mapping[str, tuple[Choice, ...]], shapes: Shapes) -> None:
        """Refuse a limit that no choice of the bits allowed meets, and a table that lacks one of them.

        Raises AllocationError.
        """
        costs = [[self.table.of(name, shapes[name], bits) for bits in each] for name, each in allowed.items()]
        low, high = (sum(map(choose, costs)) for choose in (min, max))
        if low > self.limit * (1 + _TOLERANCE):
            raise AllocationError(
                f"A budget of {self.text} cannot be met: the bits allowed take from {low:.7g} to {high:.7g} "
                f"{self.table.unit}; raise `max_cost`, or allow other bits with `candidates`."
            )

    def priced(self, layer: LayerOptions, shape: tuple[int, int]) -> LayerOptions:
        """The same choices with steps of this budget in place of bytes; more than all of it is all the same."""
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
) -> Budget | CostLimit:
    """From the options of the command line. Raises AllocationError where they do not go together."""
    if cost == "bits":
        if cost_table is not None or max_cost is not None:
            raise AllocationError("`cost_table` and `max_cost` are for `cost` latency or energy; say which.")
        return Budget.parse(average_bits, target_size, max_divergence)
    if any(each is not None for each in (average_bits, target_size, max_divergence)):
        raise AllocationError(
            f"`avg_bits`, `target_size` and `max_divergence` are for `cost=bits`; give `max_cost` for `cost` {cost}."
        )
    if cost_table is None or max_cost is None:
        raise AllocationError(
            f"`cost` {cost} needs `cost_table`, a file of what layers cost, and `max_cost` in its unit; give both."
        )
    if not 0 < max_cost < float("inf"):
        raise AllocationError(f"`max_cost` {max_cost} is not valid; give a number above 0.")
    table = load_cost_table(cost_table)
    if table.cost != cost:
        raise AllocationError(f"Cost table {cost_table} is of {table.cost}; give it to `cost` {table.cost}.")
    return CostLimit(table, max_cost)


def load_cost_table(path: Path) -> CostTable:
    """Read a cost table. Raises AllocationError in one sentence where it cannot be read or is none."""
    if not path.is_file():
        raise AllocationError(f"There is no cost table {path}; give the path of a JSON file.")
    if path.stat().st_size > _MAX_BYTES:
        raise AllocationError(
            f"Cost table {path} has more than {_MAX_BYTES:,} bytes, which no table has; make it again."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise AllocationError(
            f"Cost table {path} is not valid JSON ({' '.join(str(failure).split())}); mend it."
        ) from None
    if not isinstance(values, dict) or values.get("format") != TABLE_FORMAT:
        raise AllocationError(
            f'{path} is no cost table; it must begin with {{"format": "{TABLE_FORMAT}", "version": 1.'
        )
    try:
        return CostTable.model_validate(values)
    except ValidationError as failure:
        place, message = first_fault(failure)
        raise AllocationError(f"{', '.join((f'Cost table {path}', *place))}: {message}; mend it.") from None
