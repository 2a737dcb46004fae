"""Random compressed matrices, for benchmarks of kernels."""

from __future__ import annotations

import torch

from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight


def random_matrix(layout: PackedLayout, generator: torch.Generator) -> QuantizedWeight:
    """Random stored tensors, on the device of the generator: every byte is a valid code."""
    device = generator.device
    tensors = {}
    for name, (shape, dtype) in layout.tensors().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, device=device, generator=generator)
        else:
            tensors[name] = (0.05 + 0.2 * torch.rand(shape, device=device, generator=generator)).to(dtype)
    return QuantizedWeight(layout, tensors)
