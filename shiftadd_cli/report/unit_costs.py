"""Energy costs of single operations, from a documented YAML file: the packaged one or the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import yaml
from pydantic import Field, ValidationError

from shiftadd_cli.bcq.primitives.base import Operation
from shiftadd_cli.errors import CostError, first_fault
from shiftadd_cli.storage.file_part import FilePart

UNIT_COSTS_FORMAT: Final = "shiftadd unit costs"
PACKAGED = Path(__file__).with_name("unit_costs_45nm.yaml")
_MAX_BYTES = 100_000

OPERATIONS: Final[tuple[Operation, ...]] = get_args(Operation)


class UnitCost(FilePart):
    """Energy of one operation, and the source of the number."""

    picojoules: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: Annotated[str, Field(min_length=1)]


class UnitCosts(FilePart):
    """The file: one entry for each of `OPERATIONS`."""

    format: Literal["shiftadd unit costs"]
    version: Literal[1]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    operations: dict[Operation, UnitCost]

    def energy(self, counts: Mapping[Operation, int]) -> float:
        """Total picojoules for these counts of operations."""
        return sum(count * self.operations[name].picojoules for name, count in counts.items())


def load_unit_costs(path: Path = PACKAGED) -> UnitCosts:
    """Read a file of unit costs. Raises CostError if it cannot be read, is not such a file or lacks an operation."""
    if not path.is_file():
        raise CostError(f"There is no file of unit costs {path}; give the path of a YAML file.")
    if path.stat().st_size > _MAX_BYTES:
        raise CostError(f"{path} has more than {_MAX_BYTES:,} bytes, too many for unit costs; give another file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as failure:
        raise CostError(f"Unit costs {path} are not valid YAML ({failure}); fix the file.") from None
    if not isinstance(values, dict) or values.get("format") != UNIT_COSTS_FORMAT:
        raise CostError(f"{path} is not a file of unit costs; it must begin with format: {UNIT_COSTS_FORMAT}.")
    try:
        costs = UnitCosts.model_validate(values)
    except ValidationError as failure:
        keys, message = first_fault(failure)
        raise CostError(f"{', '.join((f'Unit costs {path}', *keys))}: {message}; fix the file.") from None
    if missing := [name for name in OPERATIONS if name not in costs.operations]:
        raise CostError(f"Unit costs {path} lack {missing[0]}; add it.")
    return costs
