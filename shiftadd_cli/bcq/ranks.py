"""Whole matrices between ranks, codes and values, group by group.

All matrices here are transposed, `[in, out]`; tables have batch shape `[C, out]`, one entry per group of columns and
row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import LevelTable


def _group(group: int, group_columns: int) -> slice:
    return slice(group * group_columns, (group + 1) * group_columns)


def nearest_ranks(weights: Tensor, tables: LevelTable, group_columns: int) -> tuple[Tensor, Tensor]:
    """Nearest level of every weight float32 `[in, out]`: ranks uint8 and values float32, `[in, out]`."""
    ranks = torch.zeros_like(weights, dtype=torch.uint8)
    for group in range(tables.levels.shape[1]):
        where = _group(group, group_columns)
        for midpoint in tables.midpoints[:, group]:
            ranks[where] += weights[where] > midpoint
    return ranks, values_of(tables, group_columns, ranks)


def values_of(tables: LevelTable, group_columns: int, ranks: Tensor) -> Tensor:
    """Values float32 `[in, out]` of ranks uint8 `[in, out]`."""
    out = torch.empty(ranks.shape, dtype=tables.levels.dtype, device=ranks.device)
    for group in range(tables.levels.shape[1]):
        where = _group(group, group_columns)
        out[where] = tables.levels[:, group].gather(0, ranks[where].long())
    return out


def codes_of(tables: LevelTable, group_columns: int, ranks: Tensor) -> Tensor:
    """Codes uint8 `[in, out]` of ranks uint8 `[in, out]`."""
    out = torch.empty_like(ranks)
    for group in range(tables.codes.shape[1]):
        where = _group(group, group_columns)
        out[where] = tables.codes[:, group].gather(0, ranks[where].long())
    return out


def ranks_of(tables: LevelTable, group_columns: int, codes: Tensor) -> Tensor:
    """Ranks uint8 `[in, out]` of codes uint8 `[in, out]`."""
    rank_of_code = tables.codes.long().argsort(dim=0).to(torch.uint8)
    out = torch.empty_like(codes)
    for group in range(tables.codes.shape[1]):
        where = _group(group, group_columns)
        out[where] = rank_of_code[:, group].gather(0, codes[where].long())
    return out


def flip_negative(
    codes: Tensor, scales: Tensor, curvature: Tensor, group_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Make scales positive by inverting the planes of the negative ones; the values stay the same.

    codes: uint8 `[in, out]`; scales: `[out, C, bits]`; curvature: `[out, C, terms, terms]`, whose rows and columns
    change sign with their plane.
    """
    bits = scales.shape[-1]
    negative = scales < 0
    weights_of_bits = 1 << torch.arange(bits, device=scales.device)
    mask = (negative * weights_of_bits).sum(-1).to(torch.uint8)
    per_column = mask.T.repeat_interleave(group_columns, dim=0)[: codes.shape[0]]
    sign = torch.ones(curvature.shape[:-1], device=scales.device)
    sign[..., :bits] = torch.where(negative, -1.0, 1.0)
    return codes ^ per_column, scales.abs(), curvature * sign.unsqueeze(-1) * sign.unsqueeze(-2)
