"""Compressed linear layers in vLLM's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.vllm_plugin.fused import FusedLinear
from shiftadd_cli.vllm_plugin.loading import close_gates, open_gates

ONE_GPU = (
    "vLLM is set to split layers, which a shiftadd checkpoint does not allow (rotations and groups extend across the "
    "splits); start vLLM with --tensor-parallel-size 1."
)


class ShiftaddLinearMethod(LinearMethodBase):
    """Computes a layer with a `FusedLinear`, which becomes the layer's module `compressed`."""

    def __init__(self, layouts: Mapping[str, PackedLayout]) -> None:
        """layouts: of the compressed modules the layer consists of, in its order, by name."""
        self.layouts = layouts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Raises ArtifactError for tensor parallelism, and for sizes that differ from the checkpoint's."""
        rows = sum(output_partition_sizes)
        if (input_size_per_partition, rows) != (input_size, output_size):
            raise ArtifactError(ONE_GPU)
        grids = [layout.grid for layout in self.layouts.values()]
        if sum(grid.rows for grid in grids) != rows or any(grid.columns != input_size for grid in grids):
            sizes = ", ".join(f"{grid.rows} x {grid.columns}" for grid in grids)
            raise ArtifactError(
                f"{', '.join(self.layouts)}: the layer is {rows} x {input_size} by the model's sizes in config.json, "
                f"but {sizes} by its quantization_config; quantize the model again."
            )
        layer.compressed = FusedLinear(self.layouts, params_dtype)
        open_gates(layer, layer.compressed)

    def process_weights_after_loading(self, layer: Any) -> None:
        close_gates(layer, layer.compressed)
        layer.compressed.finish()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` → `[..., out]`."""
        output: Tensor = layer.compressed(x, bias)
        return output
