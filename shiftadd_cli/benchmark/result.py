"""What a benchmark found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shiftadd_cli.benchmark.layer_speed import LayerSpeed
from shiftadd_cli.benchmark.machine import Machine
from shiftadd_cli.benchmark.model_speed import ModelSpeed
from shiftadd_cli.benchmark.roof import Roof


@dataclass(frozen=True)
class Benchmark:
    """Models measured beside each other, and the layers of the first.

    Attributes:
        conditions: what the work was, as JSON types by name; described: the same in words.
        rounds: how often everything was measured.
        models: the first is the one asked about, the others what it is compared with.
        roof: the memory's speed; None where layers were left out.
    """

    machine: Machine
    conditions: dict[str, Any]
    described: str
    rounds: int
    models: tuple[ModelSpeed, ...]
    roof: Roof | None
    layers: tuple[LayerSpeed, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types, every round of every measurement included."""
        first, *others = self.models
        return {
            "machine": self.machine.to_dict(),
            **self.conditions,
            "rounds": self.rounds,
            "gains": {
                other.name: {what: gain.to_dict() for what, gain in first.gains_over(other).items()} for other in others
            },
            "models": [model.to_dict() for model in self.models],
            "roof": self.roof and self.roof.to_dict(),
            "layers": [layer.to_dict(self.roof) for layer in self.layers] if self.roof is not None else [],
        }
