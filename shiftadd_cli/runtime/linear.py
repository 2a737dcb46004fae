"""The linear layer over a compressed weight: on look-up tables where they can run, in plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from shiftadd_cli.bcq.rotation import rotate_input
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.kernels.ops import gpu_linear, lookup_linear
from shiftadd_cli.kernels.select import Kernel
from shiftadd_cli.runtime.packed import PackedWeight

# Size of one tile of decoded float32 rows; a matrix of a small model fits in one.
TILE_BYTES = 4 << 20

_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear(PackedWeight):
    """`x @ W.T + bias` with W in compressed form.

    A prepared layer on a CPU computes with look-ups and additions. Before `prepare`, and for inputs that the kernels do
    not take (float64, gradients), every call decodes the matrix tile by tile.

    The output equals `F.linear(R x, packed().decode_stored().to(x.dtype), bias)`, where R is the rotation, if any, plus
    the part of the outlier columns, if any. It differs by the rounding of the dot products, which are summed in another
    order (for float32: a few units in the last place of the sum of |terms|; with 16-bit tables, see `kernels.choice`,
    8e-4 of the output's norm). In exact arithmetic it is `F.linear(x, decode(), bias)`.

    The matrix of a shift layer is always decoded, tile by tile: no kernel takes one.

    `transposed` records that the layer replaces a transformers `Conv1D`, whose dense weight is [in, out].
    """

    bias: nn.Parameter | None
    # (x `[..., in]`, signs `[in]`) → R x; layers that read the same input may share one that remembers its result.
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
        """`dtype`: of the bias and of `weight.dtype`, the default dtype if None. Stored tensors start as 0."""
        super().__init__()
        self.transposed = transposed
        self.rotate = rotate_input
        self._hold(layout, (layout.rows, layout.columns), device, dtype)
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
        """A layer over the tensors of `weight`, which are shared, not copied; `bias` is `[out]`."""
        dtype = bias.dtype if dtype is None and bias is not None else dtype
        layer = cls(weight.layout, bias=bias is not None, transposed=transposed, device="meta", dtype=dtype)
        for suffix, tensor in weight.tensors.items():
            setattr(layer, suffix, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer._dtype))
        return layer

    @property
    def in_features(self) -> int:
        return self.layout.columns

    @property
    def out_features(self) -> int:
        return self.layout.rows

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]` in the dtype of `x` (float32, bfloat16, float16 or float64)."""
        kernel = self.kernel
        if x.dtype not in _KERNEL_TYPES or (x.requires_grad and torch.is_grad_enabled()):
            kernel = Kernel.REFERENCE
        if kernel is Kernel.CPU:
            output = self._look_up(x)
        elif kernel is Kernel.TRITON:
            output = self._multiply_on_gpu(x)
        else:
            output = self._decode_and_multiply(x)
        if not self.layout.outliers:
            return output
        columns, ids = self.get_parameter("weight_columns"), self.get_parameter("weight_column_ids")
        return output + linear(x[..., ids], columns.to(x.dtype))

    def _look_up(self, x: Tensor) -> Tensor:
        weight = self.on_cpu()
        signs = weight.signs
        if signs is not None and self.rotate is not rotate_input:
            # Another layer may already have rotated this input.
            x, signs = self.rotate(x, signs), None
        return lookup_linear(
            x,
            weight.words,
            weight.scale_codes,
            weight.scales,
            weight.offsets,
            weight.row_scale,
            self.bias,
            signs,
            self.layout.grid.group_columns,
            self.layout.bits,
            self.layout.planes,
            self.precision.is_fast(x.dtype),
        )

    def _multiply_on_gpu(self, x: Tensor) -> Tensor:
        assert self._on_gpu is not None, "set by prepare"
        rotated = x if self._rotation is None else self.rotate(x, self._rotation)
        return gpu_linear(rotated, self._on_gpu, self.bias)

    def _decode_and_multiply(self, x: Tensor) -> Tensor:
        height = max(1, TILE_BYTES // (4 * self.in_features))
        packed, tiles = self.packed(), []
        signs = packed.signs()
        rotated = x if signs is None else self.rotate(x, signs)
        for rows, tile in packed.tiles(height):
            bias = None if self.bias is None else self.bias[rows].to(x.dtype)
            tiles.append(linear(rotated, tile.to(x.dtype), bias))
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{super().extra_repr()}"
        )
