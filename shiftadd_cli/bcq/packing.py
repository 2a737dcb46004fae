"""Bit planes and nibble streams.

Planes: one bit per weight, eight neighbouring columns per byte, the lowest column in the least significant bit.
1 means +1 and 0 means −1; padding bits of the last byte are 0.
Nibbles: two per byte, the first in the low half; the padding nibble of an odd count is 0.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_BIT = tuple(range(8))


def pack_planes(planes: Tensor) -> Tensor:
    """Pack boolean planes `[..., columns]` (True for +1) into uint8 `[..., ceil(columns / 8)]`."""
    columns = planes.shape[-1]
    padded = torch.nn.functional.pad(planes.to(torch.uint8), (0, -columns % 8))
    bits = padded.view(*planes.shape[:-1], -1, 8) << torch.tensor(_BIT, dtype=torch.uint8, device=planes.device)
    return bits.sum(-1, dtype=torch.uint8)


def unpack_planes(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_planes`: uint8 `[..., ceil(columns / 8)]` → bool `[..., columns]`."""
    bits = packed.unsqueeze(-1) >> torch.tensor(_BIT, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten(-2)[..., :columns]


def unpack_signs(packed: Tensor, columns: int) -> Tensor:
    """Planes as float32 signs: uint8 `[..., ceil(columns / 8)]` → `[..., columns]` of −1.0 and +1.0."""
    return _signs(packed, columns).float()


def unpack_codes(packed: Tensor, columns: int) -> Tensor:
    """Unpack codes stored as one plane per bit, lowest bit first: uint8 `[rows, bits, ceil(columns / 8)]` with up to 7
    bits → int32 `[rows, columns]`."""
    # Σ ±2^b is 2 · code − (2^bits − 1), so the code follows from the signs, which unpack eight at a time.
    doubled, *others = (_signs(plane, columns) for plane in packed.unbind(1))
    for bit, signs in enumerate(others, start=1):
        doubled.add_(signs, alpha=1 << bit)
    return (doubled.int() + ((1 << packed.shape[1]) - 1)) >> 1


def _signs(packed: Tensor, columns: int) -> Tensor:
    """Planes as int8 signs `[..., columns]`, −1 and +1."""
    # One 64-bit load fetches the eight signs of a byte; a table of floats would move four times as much memory.
    eights = sign_table(packed.device).index_select(0, packed.flatten().int())
    return eights.view(torch.int8).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :columns]


@cache
def sign_table(device: torch.device) -> Tensor:
    """The eight int8 signs of every byte, lowest column first in memory, as one word: int64 `[256]`."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device)
    signs = unpack_planes(every_byte.unsqueeze(-1), 8).to(torch.int8).mul_(2).sub_(1)
    return signs.view(torch.int64).squeeze(-1)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """Pack values 0–15 `[..., count]` into uint8 `[..., ceil(count / 2)]`."""
    padded = torch.nn.functional.pad(nibbles.to(torch.uint8), (0, nibbles.shape[-1] % 2))
    pairs = padded.view(*nibbles.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 `[..., ceil(count / 2)]` → uint8 `[..., count]` of values 0–15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]
