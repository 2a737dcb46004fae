"""Formats, layouts, solver options and recipes of the tests, with the values of `equal-bits` as defaults."""

from __future__ import annotations

from typing import Any

from shiftadd_cli.bcq.choices import Primitive
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.recipe import Recipe


def recipe_of(**fields: Any) -> Recipe:
    """The recipe `equal-bits` with some fields changed."""
    return Recipe.load("equal-bits", fields)


def solver_options(**fields: Any) -> SolverOptions:
    """The solver options of `equal-bits` with some fields changed, including those of the format."""
    return changed(recipe_of().solver_options, **fields)


def changed(options: SolverOptions, **fields: Any) -> SolverOptions:
    """The options with some fields changed, including those of the format."""
    stored = {name: fields.pop(name) for name in MatrixFormat.model_fields if name in fields}
    return options.replaced(format=options.format.replaced(**stored), **fields)


def matrix_format(
    bits: int = 3,
    group_size: int | str = 16,
    group_rows: int | str = 1,
    scale_format: Any = "apot2",
    row_scale: bool = True,
    offset: bool = False,
    rotation: Any = "none",
    outlier_columns: float = 0.0,
    primitive: Primitive = "bcq",
) -> MatrixFormat:
    """A format in small groups, without rotation."""
    return MatrixFormat(
        bits=bits,
        group_size=group_size,
        group_rows=group_rows,
        scale_format=scale_format,
        row_scale=row_scale,
        offset=offset,
        rotation=rotation,
        outlier_columns=outlier_columns,
        primitive=primitive,
    )


def layout_on(
    grid: ScaleGrid,
    bits: int,
    scale_format: str,
    row_scale: bool,
    offset: bool,
    rotation: bool = False,
    outliers: int = 0,
    primitive: Primitive = "bcq",
) -> PackedLayout:
    """The layout of planes with scales on a grid, and with `outliers` outlier columns."""
    form = matrix_format(
        bits,
        grid.group_columns,
        grid.group_rows,
        scale_format,
        row_scale,
        offset,
        "hadamard" if rotation else "none",
        outliers / grid.columns,
        primitive,
    )
    return PackedLayout(form, grid.rows, grid.columns)
