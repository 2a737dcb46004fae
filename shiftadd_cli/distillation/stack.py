"""Samples on their way through all blocks of a compressed model, forwards and backwards, block after block decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shiftadd_cli.blockwise.calls import BlockCall
from shiftadd_cli.blockwise.forward import check_finite
from shiftadd_cli.distillation.block import TunedBlock

# Decoded matrices that stay in memory from step to step; blocks beyond it are decoded anew at every step.
MEMORY_BYTES = 1 << 30


class Stack:
    """The `blocks` of a model, in order; `calls[batch]` has the call of each."""

    def __init__(
        self,
        blocks: Sequence[TunedBlock],
        calls: Mapping[int, Sequence[BlockCall]],
        device: torch.device,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.blocks = blocks
        self._calls, self._device, self._free = calls, device, memory_bytes
        self._held: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def forward(self, index: int, hidden: Tensor) -> list[Tensor]:
        """Inputs of every block for batch number `index` at the first, `[batch, tokens, width]`, and at the end the
        last's output; on the CPU. Raises NumericalError naming the block whose output is not finite."""
        found = [hidden.cpu()]
        for depth, block in enumerate(self.blocks):
            output = block.run(self._calls[index][depth], found[-1].to(self._device), self._decoded(depth))
            check_finite(output, block.name)
            found.append(output.cpu())
        return found

    def backward(self, index: int, inputs: list[Tensor], gradient: Tensor) -> None:
        """Add to the gradients of what is tuned; `inputs` are what `forward` gave but the last, and are used up."""
        gradient = gradient.to(self._device)
        for depth in reversed(range(len(self.blocks))):
            hidden = inputs.pop()
            call, decoded = self._calls[index][depth], self._decoded(depth)
            gradient = self.blocks[depth].backward(call, hidden.to(self._device), gradient, decoded)

    def _decoded(self, depth: int) -> dict[str, Tensor]:
        """Matrices of a block."""
        if depth in self._held:
            return self._held[depth]
        decoded = self.blocks[depth].decoded()
        size = sum(each.nbytes for each in decoded.values())
        if size <= self._free:
            self._free -= size
            self._held[depth] = decoded
        return decoded
