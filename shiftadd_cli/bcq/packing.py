"""Bit planes and nibble streams.

Planes: one bit per weight, eight neighbouring columns to a byte, the lowest column in the least significant bit,
1 meaning +1 and 0 meaning −1; padding bits of the last byte are 0.
Nibbles: two to a byte, the first in the low half; the padding nibble of an odd count is 0.
"""

from __future__ import annotations

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
    table = sign_table().to(packed.device)
    return table[packed.int()].flatten(-2)[..., :columns]


def sign_table() -> Tensor:
    """The eight signs of every byte: float32 `[256, 8]`."""
    every_byte = torch.arange(256, dtype=torch.uint8)
    return unpack_planes(every_byte.unsqueeze(-1), 8).float().mul_(2).sub_(1)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """Pack values 0–15 `[..., count]` into uint8 `[..., ceil(count / 2)]`."""
    padded = torch.nn.functional.pad(nibbles.to(torch.uint8), (0, nibbles.shape[-1] % 2))
    pairs = padded.view(*nibbles.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 `[..., ceil(count / 2)]` → uint8 `[..., count]` of values 0–15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :count]
