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
        prompt_tokens: lengths of the prompts, ascending; new tokens were made after the first.
        batch: prompts read at once; rounds: how often everything was measured.
        models: the first is the one asked about, the others what it is compared with.
        roof: the memory's speed; None where layers were left out.
    """

    machine: Machine
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    batch: int
    rounds: int
    models: tuple[ModelSpeed, ...]
    roof: Roof | None
    layers: tuple[LayerSpeed, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types, every round of every measurement included."""
        first, *others = self.models
        return {
            "machine": self.machine.to_dict(),
            "prompt_tokens": list(self.prompt_tokens),
            "new_tokens": self.new_tokens,
            "batch": self.batch,
            "rounds": self.rounds,
            "gains": {
                other.name: {what: gain.to_dict() for what, gain in first.gains_over(other).items()} for other in others
            },
            "models": [model.to_dict() for model in self.models],
            "roof": self.roof and self.roof.to_dict(),
            "layers": [layer.to_dict(self.roof) for layer in self.layers] if self.roof is not None else [],
        }
