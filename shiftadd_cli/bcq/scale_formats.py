"""Scale formats: the values that a scale can take, relative to its row scale, and their codes.

A scale is `row_scale · ratio`. The ratio is stored as

- `pot`:   4 bits, e:                 2^−e                                e = 0 … 14, and e = 15 means 0
- `apot2`: 8 bits, e, t₂:             2^−e ± 2^−(e+d₂)                    the paper's additive powers of two
- `apot3`: 12 bits, e, t₂, t₃:        2^−e ± 2^−(e+d₂) ± 2^−(e+d₂+d₃)      (ShiftAddLLM, section 4.1, uses three terms)
- `float`: IEEE half precision

where a term nibble t holds d in its low three bits (0: no term) and the sign in its high bit (1: minus). Unlike the
paper's reference code, this format stores signs and has a code for zero.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

ZERO_EXPONENT = 15
OFFSET_STEP = 1 / 8


@dataclass(frozen=True)
class ScaleFormat:
    """One scale format.

    `nibbles` is the number of 4-bit fields in a code (0 for `float`). `table` float32 `[16 ** nibbles]` decodes a code.
    `values` float32, ascending and distinct, are the representable ratios; `codes` int32 has one code for each.
    """

    name: str
    nibbles: int
    table: Tensor
    values: Tensor
    codes: Tensor

    @property
    def offset_limit(self) -> float:
        """Largest |offset| that is available with both signs, in units of the group's largest scale."""
        return 7 * OFFSET_STEP if self.nibbles else math.inf

    def round(self, ratios: Tensor) -> Tensor:
        """Nearest representable ratio, elementwise; the lower of two equally near ones; 0 for negative ratios."""
        if not self.nibbles:
            return ratios.clamp(0, torch.finfo(torch.float16).max).half().float()
        nearest = torch.searchsorted(self.midpoints.to(ratios.device), ratios.contiguous())
        return self.values.to(ratios.device)[nearest]

    def round_offsets(self, offsets: Tensor, ratios: Tensor) -> Tensor:
        """Nearest offset `[...]` that can be stored along with representable `ratios` `[..., bits]`."""
        if self.nibbles:
            return offset_multiples(offsets, ratios) * _offset_unit(ratios)
        largest = torch.finfo(torch.float16).max
        return offsets.clamp(-largest, largest).half().float()

    def round_one(self, ratio: float) -> float:
        """`round` for one number, without the cost of a tensor."""
        if not self.nibbles:
            return float(self.round(torch.tensor(ratio, device="cpu")))
        midpoints, values = self._lists
        return values[bisect_left(midpoints, ratio)]

    @cached_property
    def _lists(self) -> tuple[list[float], list[float]]:
        return self.midpoints.tolist(), self.values.tolist()

    @cached_property
    def midpoints(self) -> Tensor:
        """Midpoints of neighbouring values, float32 `[values − 1]`."""
        return (self.values[1:] + self.values[:-1]) / 2

    def encode(self, ratios: Tensor) -> Tensor:
        """Codes int32 of representable ratios (results of `round`); not for `float`."""
        return self.codes.to(ratios.device)[torch.searchsorted(self.values.to(ratios.device), ratios.contiguous())]

    def decode(self, codes: Tensor) -> Tensor:
        """Ratios float32 of integer codes; not for `float`."""
        return self.table.to(codes.device)[codes.long()]


def _decode_table(nibbles: int) -> Tensor:
    """Ratios float32 `[16 ** nibbles]` of all codes; nibble k of a code is `code >> 4k`."""
    # The device is explicit: the first call may run under torch.device("meta"), where transformers builds its models.
    codes = torch.arange(16**nibbles, device="cpu")
    exponent = codes & 15
    ratio = torch.exp2(-exponent.double())
    shift = exponent.double()
    for k in range(1, nibbles):
        term = (codes >> (4 * k)) & 15
        distance, sign = term & 7, torch.where(term & 8 > 0, -1.0, 1.0)
        shift = shift + distance
        ratio = torch.where(distance > 0, ratio + sign * torch.exp2(-shift), ratio)
    return torch.where(exponent == ZERO_EXPONENT, 0.0, ratio).float()


@cache
def scale_format(name: str) -> ScaleFormat:
    """The scale format `pot`, `apot2`, `apot3` or `float`."""
    nibbles = {"pot": 1, "apot2": 2, "apot3": 3, "float": 0}[name]
    if not nibbles:
        empty = torch.empty(0, device="cpu")
        return ScaleFormat(name, 0, empty, empty, empty)
    table = _decode_table(nibbles)
    order = torch.argsort(table, stable=True)
    values, first = _distinct(table[order])
    return ScaleFormat(name, nibbles, table, values, order[first].int())


def _distinct(ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values of a sorted vector and the index of the first occurrence of each."""
    first = torch.ones_like(ascending, dtype=torch.bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return ascending[first], first.nonzero().squeeze(-1)


def offset_multiples(offsets: Tensor, ratios: Tensor) -> Tensor:
    """Offsets `[...]` as whole multiples, −8 … 7, of `OFFSET_STEP` × the largest of `ratios` `[..., bits]`."""
    unit = _offset_unit(ratios)
    return torch.where(unit > 0, offsets / unit, 0.0).round().clamp(-8, 7)


def _offset_unit(ratios: Tensor) -> Tensor:
    return ratios.amax(-1) * OFFSET_STEP


def encode_offsets(multiples: Tensor) -> Tensor:
    """Offset nibbles (two's complement, uint8 0–15) of whole multiples −8 … 7 of `OFFSET_STEP` × the largest scale."""
    return multiples.to(torch.int8).bitwise_and(15).to(torch.uint8)


def decode_offsets(nibbles: Tensor) -> Tensor:
    """Offsets float32, as fractions of the group's largest scale, of uint8 nibbles."""
    signed = nibbles.to(torch.int8)
    return torch.where(signed > 7, signed - 16, signed).float() * OFFSET_STEP
