"""Tables of 8-bit rows: the form in which embeddings and output heads are stored.

    W[r, i] ≈ scale[r] · code[r, i]          code ∈ {−127, …, 127}

Stored tensors (names are suffixes of the parameter `weight`):

    weight_int8        int8     [rows, columns]
    weight_int8_scale  bfloat16 [rows]               largest magnitude of the row over 127; 0 for a row of zeros

The scale is rounded to bfloat16 before the codes are chosen, so that they make up for its rounding. This is symmetric
rounding to nearest by rows ("absmax"), as in LLM.int8() (arXiv:2208.07339, section 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.errors import NumericalError

CODES, SCALE = "weight_int8", "weight_int8_scale"
SUFFIXES = (CODES, SCALE)

_LARGEST = 127
# Weights turned into float32 at a time: a vocabulary of a large model in float32 would be gigabytes.
_TILE_WEIGHTS = 1 << 22


def table_tensors(rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor, by suffix."""
    return {CODES: ((rows, columns), torch.int8), SCALE: ((rows,), torch.bfloat16)}


def table_bytes(rows: int, columns: int) -> int:
    """Bytes stored for a table, everything counted."""
    return rows * columns * torch.int8.itemsize + rows * torch.bfloat16.itemsize


def encode_table(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Round a floating-point matrix `[rows, columns]` to codes int8 `[rows, columns]` and scales bfloat16 `[rows]`.

    Raises NumericalError, naming the layer `name`, if a weight is not finite.
    """
    codes = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    for rows in _tiles(weight):
        tile = weight[rows].float()
        scale = (tile.abs().amax(1) / _LARGEST).to(torch.bfloat16)
        # NaN and infinity go through the maximum; what decodes to infinity is refused with them.
        if not torch.isfinite(_LARGEST * scale.float()).all():
            raise NumericalError(f"The weight of {name} is not finite; the source checkpoint is damaged.")
        # A scale of 0 belongs to weights so near to 0 that, divided by 1, they round to the code 0. A scale among the
        # subnormal numbers may have been rounded down by much, hence the clamp.
        divisor = torch.where(scale > 0, scale.float(), 1.0).unsqueeze(1)
        codes[rows] = (tile / divisor).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        scales[rows] = scale
    return codes, scales


def decode_table(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `[..., columns]` for codes `[..., columns]` and scales `[...]`: float32 products, rounded to `dtype`."""
    return (codes.float() * scales.float().unsqueeze(-1)).to(dtype)


def decode_table_into(codes: Tensor, scales: Tensor, out: Tensor) -> float:
    """Overwrite `out` `[rows, columns]` by the decoded table; returns ‖W - Ŵ‖² / ‖W‖² against what it held before.

    0 for a matrix of zeros. The sums are float64.
    """
    error = size = 0.0
    for rows in _tiles(out):
        decoded, before = decode_table(codes[rows], scales[rows]), out[rows].float()
        error += float((before - decoded).square_().sum(dtype=torch.float64))
        size += float(before.square_().sum(dtype=torch.float64))
        out[rows] = decoded.to(out.dtype)
    return error / size if size else 0.0


def _tiles(weight: Tensor) -> list[slice]:
    step = max(1, _TILE_WEIGHTS // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
