"""The cost of a uniform grid in a format of its own, where ours stores a scale per plane."""

from __future__ import annotations

from collections.abc import Iterable

from shiftadd_cli.bcq.choices import PLANES
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.recipe import Recipe

SCALE_BITS = 16


def is_uniform(recipe: Recipe) -> bool:
    """Whether every group ends on evenly spaced levels, the same in every layer: only then does one scale suffice."""
    return (
        recipe.fit == "uniform"
        and recipe.scale_format == "float"
        and recipe.refine_rounds == 0
        and not recipe.row_scale
        and recipe.primitive == PLANES
        and recipe.avg_bits is None
        and recipe.bit_plan is None
    )


def native_bits(shapes: Iterable[tuple[int, int]], recipe: Recipe) -> float | None:
    """Bits per weight of layers `(out_features, in_features)`: planes, and per group a float16 scale and, if the grid
    has an offset, an integer zero point with as many bits as there are planes. None for grids that are not uniform.
    """
    if recipe.bits is None or not is_uniform(recipe):
        return None
    per_group = SCALE_BITS + (recipe.bits if recipe.offset else 0)
    total = weights = 0
    for rows, columns in shapes:
        grid = ScaleGrid.resolve(rows, columns, recipe.group_rows, recipe.group_size)
        weights += rows * columns
        total += recipe.bits * rows * columns + per_group * grid.row_groups * grid.column_groups
    return total / weights
