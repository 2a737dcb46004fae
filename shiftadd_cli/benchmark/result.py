"""The result of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shiftadd_cli.benchmark.layer_speed import LayerSpeed
from shiftadd_cli.benchmark.machine import Machine
from shiftadd_cli.benchmark.model_speed import ModelSpeed
from shiftadd_cli.benchmark.roof import Roof


@dataclass(frozen=True)
class Benchmark:
    """Models measured in turns, and the layers of the first.

    Attributes:
        conditions: settings of the work, as JSON types by name; described: the same in words.
        rounds: number of measurements of everything.
        models: the benchmarked model first, then the models it is compared with.
        roof: the memory bandwidth; None if layers were not measured.
    """

    machine: Machine
    conditions: dict[str, Any]
    described: str
    rounds: int
    models: tuple[ModelSpeed, ...]
    roof: Roof | None
    layers: tuple[LayerSpeed, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON types, including every round of every measurement."""
        first, *others = self.models
        return {
            "machine": self.machine.to_dict(),
            **self.conditions,
            "rounds": self.rounds,
            "gains": {
                other.name: {name: gain.to_dict() for name, gain in first.gains_over(other).items()} for other in others
            },
            "models": [model.to_dict() for model in self.models],
            "roof": self.roof and self.roof.to_dict(),
            "layers": [layer.to_dict(self.roof) for layer in self.layers] if self.roof is not None else [],
        }
