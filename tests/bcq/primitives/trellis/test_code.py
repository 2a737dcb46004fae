"""Trellis codes: the register as defined, and the Viterbi algorithm against all paths."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode

SIZES = st.sampled_from([(1, 2, 2), (1, 4, 3), (2, 4, 3), (2, 6, 4), (3, 6, 4)])


@st.composite
def codes(draw: st.DrawFn) -> TrellisCode:
    bits, memory, planes = draw(SIZES)
    mask = st.integers(1, (1 << (memory + bits)) - 1)
    return TrellisCode(bits, memory, tuple(draw(mask) for _ in range(planes)))


def level_of(code: TrellisCode, column: list[int], row: int, stripe: int) -> int:
    """The level of one weight, from the definition of the register, bit by bit."""
    first = row - row % stripe
    register = [column[r] >> bit & 1 for r in range(row, first - 1, -1) for bit in range(code.bits)]
    planes = [
        sum(bit for place, bit in enumerate(register) if place < code.memory + code.bits and mask >> place & 1) % 2
        for mask in code.masks
    ]
    return sum(plane << number for number, plane in enumerate(planes))


def random_levels(code: TrellisCode, rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 1, 1 << code.planes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(codes(), st.integers(1, 20), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_selected_levels_follow_the_register(code: TrellisCode, rows: int, stripe: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 1 << code.bits, (rows, 2), generator=generator, dtype=torch.uint8)
    expected = [[level_of(code, stored[:, c].tolist(), row, stripe) for c in range(2)] for row in range(rows)]
    assert code.selected(stored, stripe).tolist() == expected


@given(codes(), st.integers(1, 9), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_encoding_finds_the_best_of_all_paths(code: TrellisCode, rows: int, stripe: int, seed: int) -> None:
    rows = min(rows, 9 // code.bits)
    levels = random_levels(code, rows, seed)
    goals = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    paths = torch.tensor(list(itertools.product(range(1 << code.bits), repeat=rows))).T
    values = levels.expand(-1, paths.shape[1], -1).gather(-1, code.selected(paths, stripe).unsqueeze(-1)).squeeze(-1)
    best = (goals.unsqueeze(-1) - values.unsqueeze(1)).square().sum(0).amin(-1)
    _, encoded = code.encode(goals, levels, stripe)
    torch.testing.assert_close((goals - encoded).square().sum(0), best)


@given(codes(), st.integers(1, 40), st.sampled_from([4, 16, 64]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_stored_bits_decode_to_the_encoded_levels(code: TrellisCode, rows: int, stripe: int, seed: int) -> None:
    levels = random_levels(code, rows, seed)
    goals = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    stored, values = code.encode(goals, levels, stripe)
    selected = code.selected(stored, stripe)
    assert torch.equal(levels.expand(-1, 2, -1).gather(-1, selected.unsqueeze(-1)).squeeze(-1), values)


@pytest.mark.parametrize(("bits", "memory", "masks"), [(2, 6, (0, 1, 2)), (2, 6, (1, 256)), (3, 2, (1,)), (0, 2, (1,))])
def test_masks_outside_the_register_are_refused(bits: int, memory: int, masks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"register|memory"):
        TrellisCode(bits, memory, masks)
