from __future__ import annotations

import pytest
import torch
from artifacts import random_weight
from compiled import needs_kernels, supported_layouts
from formats import layout_on
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.packing import pack_planes, unpack_planes
from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.kernels.cpu_weight import CpuWeight, supports


@needs_kernels
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(supported_layouts(), st.integers(0, 2**31))
def test_packed_planes_give_back_the_stored_codes(layout: PackedLayout, seed: int) -> None:
    weight = random_weight(layout, seed)
    stored = weight.tensors["weight_codes"]
    columns = layout.grid.columns
    expected = pack_planes(unpack_planes(stored, columns))
    assert torch.equal(CpuWeight.pack(weight).codes(layout), expected)


@needs_kernels
def test_words_hold_two_rows_of_sixteen_columns() -> None:
    """One word, compared bit by bit with the description in native/layout.h."""
    layout = layout_on(ScaleGrid.resolve(70, 300, 1, 100), 3, "pot", True, False)
    weight = random_weight(layout)
    planes = unpack_planes(weight.tensors["weight_codes"], 300)
    words = CpuWeight.pack(weight).words
    # Groups of 100 columns are 7 words; 70 rows are one stripe of 3 blocks.
    group, block, word, plane, pair = 1, 2, 6, 2, 4
    entry = int(words[(((group * 3 + block) * 7 + word) * 3 + plane) * 16 + pair].item())
    row = block * 32 + pair
    for column in range(16):
        inside = word * 16 + column < 100
        low = inside and planes[row, plane, group * 100 + word * 16 + column].item()
        assert (entry >> column) & 1 == low
        assert (entry >> (16 + column)) & 1 == 0, "rows 80 and up are padding"


@needs_kernels
@pytest.mark.parametrize(("form", "coded"), [("pot", True), ("apot2", True), ("apot3", False), ("float", False)])
def test_scales_of_at_most_two_terms_stay_codes(form: str, coded: bool) -> None:
    layout = layout_on(ScaleGrid.resolve(40, 64, 1, 32), 2, form, True, True)
    packed = CpuWeight.pack(random_weight(layout))
    scales = packed.scale_codes if coded else packed.scales
    assert (packed.scale_codes is None) != coded
    assert scales is not None
    assert packed.offsets is not None
    assert scales.shape == (2, 2, 2, 32)
    assert packed.offsets.shape == (2, 2, 32)


@needs_kernels
def test_large_matrices_start_on_a_huge_page() -> None:
    layout = layout_on(ScaleGrid.resolve(2048, 4096, 1, "all"), 3, "pot", True, False)
    assert CpuWeight.pack(random_weight(layout)).words.data_ptr() % (2 << 20) == 0


@pytest.mark.parametrize(
    ("group_rows", "group_size", "columns", "expected"),
    [(1, 128, 512, True), (1, "all", 512, True), ("1/8", 16, 512, True), ("1/8", 8, 512, False), ("all", 1, 512, False),
     (1, 8, 8, True)],
)  # fmt: skip
def test_groups_narrower_than_a_word_are_not_supported(
    group_rows: int | str, group_size: int | str, columns: int, expected: bool
) -> None:
    grid = ScaleGrid.resolve(64, columns, group_rows, group_size)
    assert supports(layout_on(grid, 3, "pot", False, False)) is expected
