"""What the solver is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from shiftadd_cli.bcq.choices import Choice, Primitive, parts_of_choice
from shiftadd_cli.bcq.fit import FitMethod
from shiftadd_cli.bcq.weight import PackedLayout


@dataclass(frozen=True)
class SolverOptions:
    """The fields are those of the recipe, with the same names.

    Shift layers have their row scale alone: fields on groups, scales, offsets and their fit are of binary planes, and a
    sweep is always static.

    Raises ValueError where rows that share scales are to be refined or scaled one by one.
    """

    bits: int = 3
    group_size: int | str = 128
    group_rows: int | str = 1
    scale_format: str = "apot2"
    row_scale: bool = True
    offset: bool = False
    rotation: Literal["none", "hadamard"] = "hadamard"
    fit: FitMethod = "search"
    fit_rounds: int = 4
    weight_error: float = 0.01
    sweep: Literal["none", "static", "dynamic"] = "static"
    sweep_order: Literal["hessian", "natural"] = "hessian"
    refine_rounds: int = 2
    descent_passes: int = 2
    asymmetric: float = 0.5
    outlier_columns: float = 0.0
    seed: int = 0
    primitive: Primitive = "bcq"

    def __post_init__(self) -> None:
        if self.group_rows != 1 and (self.refine_rounds or self.row_scale):
            raise ValueError("rows that share scales cannot be refined or scaled one by one")

    @classmethod
    def from_recipe(cls, recipe: object) -> SolverOptions:
        """The part of a recipe the solver needs: its fields of the same names."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})

    def at(self, choice: Choice) -> SolverOptions:
        """The same for matrices that are stored as `choice` says."""
        primitive, bits = parts_of_choice(choice)
        return replace(self, primitive=primitive, bits=bits)

    @property
    def independent_rows(self) -> bool:
        """Whether no row shares a scale with another."""
        return self.primitive != "bcq" or (self.group_rows == 1 and self.row_scale)

    def without_data(self) -> SolverOptions:
        """The same format and fit, for a layer that no calibration input reached."""
        return replace(self, sweep="none", refine_rounds=0)

    def layout(self, rows: int, columns: int) -> PackedLayout:
        """The stored form of one `[rows, columns]` matrix under these options."""
        return PackedLayout.resolve(
            rows,
            columns,
            bits=self.bits,
            group_size=self.group_size,
            group_rows=self.group_rows,
            scale_format=self.scale_format,
            row_scale=self.row_scale,
            offset=self.offset,
            rotation=self.rotation,
            outlier_columns=self.outlier_columns,
            primitive=self.primitive,
        )
