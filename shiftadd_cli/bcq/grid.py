"""The scale grid: which weights of a matrix share one set of scales.

A grid divides a weight matrix `[rows, columns]` (out_features, in_features) into `group_rows × group_columns` blocks.
Row-wise groups are `1 × 64`; the column-wise form of ShiftAddLLM (section 4.2, "Acc.") is `rows × 1`; its block form
("Lat.") is `rows/8 × 8`. The last block of a row or column may be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# Rows of a matrix: consecutive ones, or int64 `[n]` numbers in any order.
Rows: TypeAlias = slice | Tensor


def numbers_of(rows: Rows, device: torch.device) -> Tensor:
    """The numbers of the rows, int64 `[n]`."""
    return rows.to(device) if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop, device=device)


@dataclass(frozen=True)
class ScaleGrid:
    """Block shape of the scales of one weight matrix; all sizes in weights."""

    rows: int
    columns: int
    group_rows: int
    group_columns: int

    @classmethod
    def resolve(cls, rows: int, columns: int, group_rows: int | str, group_size: int | str) -> ScaleGrid:
        """Turn a recipe's `group_rows` (int, "all", "1/8") and `group_size` (int, "all") into sizes for one matrix.

        Sizes larger than the matrix mean the whole matrix; "1/8" means an eighth of the rows, rounded up.
        """
        if group_rows == "all":
            height = rows
        elif isinstance(group_rows, str):
            height = -(-rows // int(group_rows.removeprefix("1/")))
        else:
            height = min(group_rows, rows)
        width = columns if isinstance(group_size, str) else min(group_size, columns)
        return cls(rows, columns, height, width)

    @property
    def row_groups(self) -> int:
        return -(-self.rows // self.group_rows)

    @property
    def column_groups(self) -> int:
        return -(-self.columns // self.group_columns)

    def expand_rows(self, values: Tensor) -> Tensor:
        """Repeat per-row-group `values` `[row_groups, ...]` for every row: `[rows, ...]`."""
        if self.group_rows == 1:
            return values
        return values.repeat_interleave(self.group_rows, dim=0)[: self.rows]

    def select_rows(self, values: Tensor, rows: Rows) -> Tensor:
        """The per-row-group `values` `[row_groups, ...]` for some rows of the matrix: `[rows, ...]`."""
        if self.group_rows == 1:
            return values[rows]
        return values.index_select(0, numbers_of(rows, values.device) // self.group_rows)

    def expand_columns(self, values: Tensor) -> Tensor:
        """Repeat per-column-group `values` `[..., column_groups]` for every column: `[..., columns]`."""
        return values.repeat_interleave(self.group_columns, dim=-1)[..., : self.columns]

    def blocks(self, matrix: Tensor) -> Tensor:
        """Gather the weights of each block: `[rows, columns]` → `[row_groups, column_groups, height · width]`.

        Positions beyond the matrix are zero; pass the importance through the same call to give them zero weight.
        """
        height, width = self.row_groups * self.group_rows, self.column_groups * self.group_columns
        padded = torch.nn.functional.pad(matrix, (0, width - self.columns, 0, height - self.rows))
        tiles = padded.view(self.row_groups, self.group_rows, self.column_groups, self.group_columns)
        return tiles.transpose(1, 2).reshape(self.row_groups, self.column_groups, -1)
