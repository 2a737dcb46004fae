"""Bit plans of tiny models, made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shiftadd_cli.allocation.plan_file import BitPlan, Origin, PlanCalibration, PlannedLayer, PlannedModel
from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.pipeline.plan import make_plan
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.source import open_source


def plan_for(model: Path, recipe: Recipe, bits: Callable[[int], int] = lambda index: 2 + index % 3) -> BitPlan:
    """A plan with 2, 3 and 4 bits in turn, or with `bits` of the index of a layer."""
    source = open_source(str(model))
    by_bits = {width: make_plan(source, recipe, EveryLayer(width)).linears for width in (2, 3, 4)}
    layers = {
        linear.spec.name: PlannedLayer(
            bits=bits(index),
            shape=(linear.spec.out_features, linear.spec.in_features),
            bytes={width: linears[index].layout.nbytes for width, linears in by_bits.items()},
            cost={width: 4.0**-width for width in by_bits},
        )
        for index, linear in enumerate(by_bits[2])
    }
    origin = Origin(
        sensitivity="output",
        recipe_fingerprint="0" * 64,
        calibration=PlanCalibration(name="text", fingerprint="1" * 64, samples=2, seq_len=8),
        budget="3 bits per weight",
        keep=(),
        tie=(),
        tie_fused=True,
    )
    named = PlannedModel(name=source.name, fingerprint=source.fingerprint)
    return BitPlan(model=named, storage=recipe.part(MatrixStorage), made_by=origin, layers=layers)


class EveryLayer(dict[str, int]):
    """The same bits for any name."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __missing__(self, _: str) -> int:
        return self.bits
