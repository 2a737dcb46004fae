"""Bits of a uniform grid in a format of its own."""

from __future__ import annotations

import pytest
from quality.native import native_bits

from shiftadd_cli.recipe import Recipe

SHAPES = [(8, 128), (4, 100)]
WEIGHTS = 8 * 128 + 4 * 100


@pytest.mark.parametrize(
    ("name", "changes", "overhead"),
    [
        ("rtn", {}, 19 * (8 * 2 + 4 * 2)),
        ("gptq", {"group_size": "all"}, 19 * (8 + 4)),
        ("gptq", {"offset": False}, 16 * (8 * 2 + 4 * 2)),
    ],
)
def test_planes_and_one_scale_and_zero_point_per_group(name: str, changes: dict[str, object], overhead: int) -> None:
    assert native_bits(SHAPES, Recipe.load(name, changes)) == pytest.approx(3 + overhead / WEIGHTS)


@pytest.mark.parametrize("name", ["default", "fast", "shiftaddllm-acc", "shiftaddllm-lat"])
def test_other_grids_have_no_other_form(name: str) -> None:
    assert native_bits(SHAPES, Recipe.load(name)) is None


def test_a_grid_that_is_refined_is_uniform_no_more() -> None:
    assert native_bits(SHAPES, Recipe.load("gptq", {"refine_rounds": 1})) is None


def test_shift_layers_have_no_uniform_grid() -> None:
    assert native_bits(SHAPES, Recipe.load("rtn", {"primitive": "shift2", "bits": 4})) is None
