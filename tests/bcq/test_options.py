from __future__ import annotations

from dataclasses import fields

import pytest

from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.recipe import Recipe


def test_fields_are_those_of_the_recipe_with_its_defaults() -> None:
    recipe = Recipe()
    assert SolverOptions.from_recipe(recipe) == SolverOptions()
    for field in fields(SolverOptions):
        assert getattr(recipe, field.name) == field.default, field.name


@pytest.mark.parametrize("name", ["default", "fast", "gptq", "rtn", "shiftaddllm-acc", "shiftaddllm-lat"])
def test_packaged_recipes_are_options(name: str) -> None:
    recipe = Recipe.load(name)
    options = SolverOptions.from_recipe(recipe)
    assert options.scale_format == recipe.scale_format
    assert options.without_data().sweep == "none"
    assert options.without_data().refine_rounds == 0


def test_layout_is_that_of_the_matrix() -> None:
    layout = SolverOptions(bits=2, group_size=64, offset=True).layout(10, 100)
    assert (layout.grid.rows, layout.grid.columns, layout.grid.column_groups) == (10, 100, 2)
    assert (layout.bits, layout.scale_format, layout.row_scale, layout.offset) == (2, "apot2", True, True)


@pytest.mark.parametrize(("refine_rounds", "row_scale"), [(1, False), (0, True)])
def test_rows_that_share_scales_are_not_treated_one_by_one(refine_rounds: int, row_scale: bool) -> None:
    with pytest.raises(ValueError, match="share scales"):
        SolverOptions(group_rows="all", refine_rounds=refine_rounds, row_scale=row_scale)
