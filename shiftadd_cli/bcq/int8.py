"""Tables of 8-bit rows: the storage format of embeddings, heads and patch embeddings.

    W[r, i] ≈ scale[r] · code[r, i]          code ∈ {−127, …, 127}

Stored tensors (names are suffixes of the parameter `weight`; the kernels `[rows, channels, height, width]` of a
convolution keep their shape, and i runs over all axes but the first):

    weight_int8        int8     [rows, columns]
    weight_int8_scale  bfloat16 [rows]               largest magnitude of the row over 127; 0 for a row of zeros

The scale is rounded to bfloat16 before the codes are chosen, so that the codes compensate for its rounding. This is
symmetric round-to-nearest per row ("absmax"), as in LLM.int8() (arXiv:2208.07339, section 2.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shiftadd_cli.errors import NumericalError

CODES, SCALE = "weight_int8", "weight_int8_scale"
SUFFIXES = (CODES, SCALE)

_LARGEST = 127
# Weights converted to float32 at a time: the whole embedding of a large model would take gigabytes in float32.
_TILE_WEIGHTS = 1 << 22


def table_tensors(*shape: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor, by suffix, for a weight of this shape."""
    return {CODES: (shape, torch.int8), SCALE: (shape[:1], torch.bfloat16)}


def encode_table(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Round a floating-point weight `[rows, ...]` to codes int8 `[rows, ...]` and scales bfloat16 `[rows]`.

    Raises NumericalError, naming the layer `name`, if a weight is not finite.
    """
    codes = torch.empty_like(weight, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    for rows in _tiles(weight):
        tile = weight[rows].flatten(1).float()
        scale = (tile.abs().amax(1) / _LARGEST).to(torch.bfloat16)
        # NaN and infinity pass through the maximum; the same test refuses scales that decode to infinity.
        if not torch.isfinite(_LARGEST * scale.float()).all():
            raise NumericalError(f"The weight of {name} is not finite; the source checkpoint is damaged.")
        # A scale of 0 means weights so close to 0 that, divided by 1, they round to the code 0. A subnormal scale may
        # have been rounded down by a large factor, hence the clamp.
        divisor = torch.where(scale > 0, scale.float(), 1.0).unsqueeze(1)
        codes[rows] = (tile / divisor).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8).view_as(weight[rows])
        scales[rows] = scale
    return codes, scales


def decode_table(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode rows of codes `[*scales.shape, ...]`: products in float32, rounded to `dtype`."""
    factors = scales.float().view(*scales.shape, *[1] * (codes.ndim - scales.ndim))
    return (codes.float() * factors).to(dtype)


def _tiles(weight: Tensor) -> list[slice]:
    step = max(1, _TILE_WEIGHTS // max(1, math.prod(weight.shape[1:])))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
