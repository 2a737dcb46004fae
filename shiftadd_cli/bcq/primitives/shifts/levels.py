"""Shift layers, the alternative to binary planes: every weight is one power of two, or a sum of two.

    W[o, i] ≈ row_scale[o] · s · m        s ∈ {−1, +1},  m one of a few magnitudes

- `shift1`: m is a power of two (DeepShift, arXiv:1905.13298, section 3; ShiftAddViT, arXiv:2306.06446, section 4)
- `shift2`: m is 2^a, 2^a + 2^b or 2^a − 2^b

A product with a weight is then one shift of the input, or two shifts and an addition. One multiplication serves a whole
row. Two things differ from these papers. Weights are powers of two relative to their row, not absolute ones, which
would clip everything above 1. And a code does not spell out its exponents (the papers use 4 to 6 bits for each): it is
the index of a magnitude in a short list, since most pairs of exponents give sums that are duplicates or far from nearly
all weights. Among all powers (sums) whose exponents span seven octaves, the lists have the least squared error for
normally distributed weights, and rotated weights are normally distributed. Relative errors at the best scale, compared
with those of the best quantizer with the same number of levels, whatever they are (Lloyd-Max):

    bits     2      3       4       5
    shift1   .1205  .0425   .0377
    shift2   .1175  .0347   .0098   .0028
    any      .1175  .0345   .0095   .0025

shift1 gains nothing from more bits: there are almost no weights outside the window, and levels inside it stay a factor
of two apart. The longest list of shift1 contains 0, for pruned weights.

A code of `bits` bits holds the index of its magnitude, in ascending order, in its low bits; its highest bit is 1 for +.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# By primitive and bits, in units of a power of two that the row scale compensates for.
MAGNITUDES: dict[tuple[str, int], tuple[int, ...]] = {
    ("shift1", 2): (1, 4),
    ("shift1", 3): (1, 4, 8, 16),
    ("shift1", 4): (0, 1, 2, 4, 8, 16, 32, 64),
    ("shift2", 2): (6, 20),
    ("shift2", 3): (10, 33, 60, 96),
    ("shift2", 4): (5, 16, 28, 40, 56, 72, 96, 128),
    ("shift2", 5): (2, 6, 10, 15, 20, 24, 28, 34, 40, 48, 56, 63, 72, 80, 96, 128),
}


@cache
def shift_levels(primitive: str, bits: int) -> Tensor:
    """The value of every code, relative to its row scale: float32 `[2 ** bits]`; the largest is 1 or slightly more.

    Every value is an exact sum of powers of two, so nothing is rounded.
    """
    values = MAGNITUDES[primitive, bits]
    unit = 2.0 ** -(values[-1].bit_length() - 1)
    positive = torch.tensor(values, dtype=torch.float32, device="cpu") * unit
    return torch.cat((-positive, positive))


@cache
def ascending_levels(primitive: str, bits: int) -> tuple[Tensor, Tensor]:
    """Distinct levels in ascending order, float32 `[L]`, and a code for each, uint8 `[L]`; −0 becomes +0."""
    levels = shift_levels(primitive, bits)
    ordered, codes = (levels + 0.0).sort(stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return ordered[last], codes[last].to(torch.uint8)
