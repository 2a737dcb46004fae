"""The linear layer over a compressed weight, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shiftadd_cli.bcq.rotation import rotate_input
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.runtime.stored import StoredWeight

# Decoded rows held at a time, float32; a matrix of a small model is one tile.
TILE_BYTES = 4 << 20


class PackedLinear(StoredWeight):
    """`x @ W.T + bias` with W in compressed form, decoded tile by tile on every call.

    The stored tensors are frozen parameters named as in `bcq.weight`.

    The output equals `F.linear(R x, packed().decode_stored().to(x.dtype), bias)`, where R is the rotation, if there is
    one, up to the rounding of the dot products, which torch sums in another order for another tile shape (for float32:
    a few units in the last place of the sum of |terms|), plus the outlier columns' part, if there are any. In exact
    arithmetic that is `F.linear(x, decode(), bias)`.

    `transposed` remembers that the layer stands for a transformers `Conv1D`, whose dense weight is [in, out].
    """

    bias: nn.Parameter | None
    # (x `[..., in]`, signs `[in]`) → R x; layers that read the same input may be given one that remembers it.
    rotate: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self,
        layout: PackedLayout,
        *,
        bias: bool,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype`: of the bias and what `weight.dtype` says, the default dtype if None. Stored tensors start as 0."""
        super().__init__()
        self.layout = layout
        self.transposed = transposed
        self.rotate = rotate_input
        self._stand_for(tuple(layout.tensors()), (layout.grid.rows, layout.grid.columns), dtype)
        for suffix, (shape, kind) in layout.tensors().items():
            empty = torch.zeros(shape, dtype=kind, device=device)
            self.register_parameter(suffix, nn.Parameter(empty, requires_grad=False))
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=self._dtype, device=device)) if bias else None

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """A layer over the tensors of `weight`, shared and not copied; `bias` is `[out]`."""
        dtype = bias.dtype if dtype is None and bias is not None else dtype
        layer = cls(weight.layout, bias=bias is not None, transposed=transposed, device="meta", dtype=dtype)
        for suffix, tensor in weight.tensors.items():
            setattr(layer, suffix, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer._dtype))
        return layer

    @property
    def in_features(self) -> int:
        return self.layout.grid.columns

    @property
    def out_features(self) -> int:
        return self.layout.grid.rows

    def packed(self) -> QuantizedWeight:
        """The compressed matrix; shares memory with the parameters."""
        return QuantizedWeight(self.layout, {name: self.get_parameter(name).detach() for name in self.layout.tensors()})

    def decode(self) -> Tensor:
        """The matrix the layer stands for: float32 `[out, in]`."""
        return self.packed().decode()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]` in the dtype of `x` (float32, bfloat16, float16 or float64)."""
        height = max(1, TILE_BYTES // (4 * self.in_features))
        packed, tiles = self.packed(), []
        signs, outliers = packed.signs(), packed.outliers()
        rotated = x if signs is None else self.rotate(x, signs)
        for rows, tile in packed.tiles(height):
            bias = None if self.bias is None else self.bias[rows].to(x.dtype)
            tiles.append(linear(rotated, tile.to(x.dtype), bias))
        output = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)
        if outliers is None:
            return output
        columns, ids = outliers
        return output + linear(x[..., ids], columns.to(x.dtype))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.layout.bits}, scale_format={self.layout.scale_format}, rotation={self.layout.rotation}"
        )
