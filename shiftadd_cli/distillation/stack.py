"""Forward and backward passes through all blocks of a compressed model, decoding one block at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shiftadd_cli.blockwise.calls import BlockCall
from shiftadd_cli.blockwise.forward import check_finite
from shiftadd_cli.distillation.block import TunedBlock

# Limit on decoded matrices cached across steps; the remaining blocks are decoded again at every step.
MEMORY_BYTES = 1 << 30


class Stack:
    """The `blocks` of a model, in order; `calls[batch]` has the call of each block."""

    def __init__(
        self,
        blocks: Sequence[TunedBlock],
        calls: Mapping[int, Sequence[BlockCall]],
        device: torch.device,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.blocks = blocks
        self._calls, self._device, self._free = calls, device, memory_bytes
        self._cached: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def forward(self, index: int, hidden: Tensor) -> list[Tensor]:
        """The inputs of all blocks and the output of the last, on the CPU, for `hidden` `[batch, tokens, width]`, the
        first input of batch number `index`. Raises NumericalError naming the block whose output is not finite."""
        states = [hidden.cpu()]
        for depth, block in enumerate(self.blocks):
            output = block.run(self._calls[index][depth], states[-1].to(self._device), self._decoded(depth))
            check_finite(output, block.name)
            states.append(output.cpu())
        return states

    def backward(self, index: int, inputs: list[Tensor], gradient: Tensor) -> None:
        """Accumulate gradients of the tunable parameters; `inputs`, the block inputs from `forward`, are consumed."""
        gradient = gradient.to(self._device)
        for depth in reversed(range(len(self.blocks))):
            hidden = inputs.pop()
            call, decoded = self._calls[index][depth], self._decoded(depth)
            gradient = self.blocks[depth].backward(call, hidden.to(self._device), gradient, decoded)

    def _decoded(self, depth: int) -> dict[str, Tensor]:
        """The decoded parameters of a block, cached while memory allows."""
        if depth in self._cached:
            return self._cached[depth]
        decoded = self.blocks[depth].decoded()
        size = sum(tensor.nbytes for tensor in decoded.values())
        if size <= self._free:
            self._free -= size
            self._cached[depth] = decoded
        return decoded
