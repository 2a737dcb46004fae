"""Levels of shift layers: their powers of two, the meaning of each code, and a comparison with all other lists."""

from __future__ import annotations

import itertools

import pytest
import torch

from shiftadd_cli.bcq.choices import CODE_BITS, Primitive
from shiftadd_cli.bcq.primitives.shifts.levels import MAGNITUDES, ascending_levels, shift_levels

TERMS: dict[Primitive, int] = {"shift1": 1, "shift2": 2}
# Relative errors on normally distributed weights, as the docstring of the module gives them.
ERRORS = {
    ("shift1", 2): 0.1205,
    ("shift1", 3): 0.0425,
    ("shift1", 4): 0.0377,
    ("shift2", 2): 0.1175,
    ("shift2", 3): 0.0347,
    ("shift2", 4): 0.0098,
    ("shift2", 5): 0.0028,
}
POWERS = [2**exponent for exponent in range(7)]
POOL = {
    "shift1": {0, *POWERS},
    "shift2": {0, *POWERS} | {a + b for a in POWERS for b in POWERS} | {abs(a - b) for a in POWERS for b in POWERS},
}


def fewest_powers(number: int) -> int:
    """The fewest signed powers of two that sum to a number (its non-adjacent form)."""
    terms = 0
    while number:
        if number % 2:
            number -= 2 - number % 4
            terms += 1
        number //= 2
    return terms


def normal_errors(magnitudes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Squared error of standard normal weights at the best of the scales: float64 `[sets]` for sets `[sets, n]`."""
    weights = torch.linspace(0, 6, 601, dtype=torch.float64)
    density = torch.exp(-weights.square() / 2)
    density /= density.sum()
    best = torch.full((len(magnitudes),), torch.inf, dtype=torch.float64)
    for scale in scales:
        levels = (magnitudes.double() * scale / magnitudes.amax(1, keepdim=True)).sort().values
        midpoints = (levels[:, 1:] + levels[:, :-1]) / 2
        indices = torch.searchsorted(midpoints, weights.expand(len(levels), -1).contiguous())
        errors = ((levels.gather(1, indices) - weights).square() * density).sum(1)
        best = torch.minimum(best, errors)
    return best


@pytest.mark.parametrize(("primitive", "bits"), MAGNITUDES)
def test_levels_are_unique_sums_of_few_powers_of_two(primitive: Primitive, bits: int) -> None:
    magnitudes = MAGNITUDES[primitive, bits]
    assert len(magnitudes) == 2 ** (bits - 1)
    assert list(magnitudes) == sorted(set(magnitudes))
    assert max(map(fewest_powers, magnitudes)) == TERMS[primitive]


def test_every_width_has_its_levels() -> None:
    widths = {(primitive, bits) for primitive in TERMS for bits in CODE_BITS[primitive]}
    assert widths == set(MAGNITUDES)


@pytest.mark.parametrize(("primitive", "bits"), MAGNITUDES)
def test_the_high_bit_is_the_sign_and_the_low_bits_are_the_index(primitive: str, bits: int) -> None:
    levels, half = shift_levels(primitive, bits), 2 ** (bits - 1)
    for index, magnitude in enumerate(MAGNITUDES[primitive, bits]):
        assert float(levels[half + index]) == -float(levels[index])
        ratio = float(levels[half + index]) / float(levels[-1])
        assert ratio * MAGNITUDES[primitive, bits][-1] == pytest.approx(magnitude)
    assert 1 <= float(levels[-1]) < 2


@pytest.mark.parametrize(("primitive", "bits"), MAGNITUDES)
def test_ascending_levels_are_unique_and_match_their_codes(primitive: str, bits: int) -> None:
    levels, codes = ascending_levels(primitive, bits)
    assert torch.equal(levels, shift_levels(primitive, bits).unique())
    assert torch.equal(shift_levels(primitive, bits)[codes.long()], levels)
    assert not torch.signbit(levels[levels == 0]).any()


@pytest.mark.parametrize(("primitive", "bits"), MAGNITUDES)
def test_no_other_magnitude_in_the_window_improves_a_list(primitive: str, bits: int) -> None:
    magnitudes = MAGNITUDES[primitive, bits]
    others = sorted(POOL[primitive] - set(magnitudes))
    lists = [
        sorted((*magnitudes[:index], other, *magnitudes[index + 1 :]))
        for index, other in itertools.product(range(len(magnitudes)), others)
    ]
    scales = torch.linspace(1.2, 4.6, 52)
    error = normal_errors(torch.tensor([magnitudes]), scales)
    assert float(error) == pytest.approx(ERRORS[primitive, bits], rel=0.02)
    if lists:
        # For the longest list of shift1, the smallest power is as good as 0, but 0 represents pruned weights.
        assert float(error) <= float(normal_errors(torch.tensor(lists), scales).min()) * 1.004
