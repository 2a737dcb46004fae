from __future__ import annotations

import pytest
from formats import solver_options
from pydantic import ValidationError

from shiftadd_cli.bcq.matrix_format import MatrixStorage
from shiftadd_cli.bcq.options import FitOptions
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import packaged_names


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_recipes_give_solver_options(name: str) -> None:
    recipe = Recipe.load(name)
    options = recipe.solver_options
    assert options.part(FitOptions) == recipe.part(FitOptions)
    assert options.format.part(MatrixStorage) == recipe.part(MatrixStorage)
    assert options.format.choice == recipe.choice
    assert options.without_data().sweep == "none"
    assert options.without_data().refine_rounds == 0


def test_the_choice_of_a_matrix_changes_nothing_else() -> None:
    options = solver_options(bits=2, group_size=64)
    shifted = options.at("shift2-4")
    assert (shifted.format.primitive, shifted.format.bits) == ("shift2", 4)
    assert shifted.at(2) == options


@pytest.mark.parametrize(("refine_rounds", "row_scale"), [(1, False), (0, True)])
def test_rows_that_share_scales_cannot_be_treated_one_by_one(refine_rounds: int, row_scale: bool) -> None:
    with pytest.raises(ValidationError, match="share scales"):
        solver_options(group_rows="all", refine_rounds=refine_rounds, row_scale=row_scale)
