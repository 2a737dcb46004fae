"""Bits per weight of a uniform grid in its native format."""

from __future__ import annotations

import pytest
from experiments.quality.native import native_bits

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
def test_native_format_stores_planes_and_one_scale_and_zero_point_per_group(
    name: str, changes: dict[str, object], overhead: int
) -> None:
    assert native_bits(SHAPES, Recipe.load(name, changes)) == pytest.approx(3 + overhead / WEIGHTS)


@pytest.mark.parametrize("name", ["default", "fast", "shiftaddllm-acc", "shiftaddllm-lat"])
def test_other_grids_have_no_native_format(name: str) -> None:
    assert native_bits(SHAPES, Recipe.load(name)) is None


def test_refined_grid_is_not_uniform() -> None:
    assert native_bits(SHAPES, Recipe.load("gptq", {"refine_rounds": 1})) is None


def test_shift_layers_have_no_uniform_grid() -> None:
    assert native_bits(SHAPES, Recipe.load("rtn", {"primitive": "shift2", "bits": 4})) is None
