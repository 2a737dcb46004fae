"""Random compressed matrices for kernel benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from shiftadd_cli.bcq.choices import Choice, parts_of_choice
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight


def plane_format(choice: Choice, group_size: int, scale_format: Any) -> MatrixFormat:
    """Planes in groups along the rows, without rotation."""
    primitive, bits = parts_of_choice(choice)
    return MatrixFormat(
        primitive=primitive,
        bits=bits,
        group_size=group_size,
        group_rows=1,
        scale_format=scale_format,
        row_scale=True,
        offset=False,
        rotation="none",
        outlier_columns=0.0,
    )


def random_matrix(layout: PackedLayout, generator: torch.Generator) -> QuantizedWeight:
    """Random stored tensors on the device of the generator; every byte is a valid code."""
    device = generator.device
    tensors = {}
    for name, (shape, dtype) in layout.tensors().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, device=device, generator=generator)
        else:
            tensors[name] = (0.05 + 0.2 * torch.rand(shape, device=device, generator=generator)).to(dtype)
    return QuantizedWeight(layout, tensors)
