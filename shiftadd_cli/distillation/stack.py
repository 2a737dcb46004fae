"""Samples on their way through all blocks of a compressed model, forwards and backwards, block after block decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from shiftadd_cli.calibration.trace import BlockCall, check_finite
from shiftadd_cli.distillation.block import TunedBlock
from shiftadd_cli.source import Source

# Decoded matrices that stay in memory from step to step; blocks beyond it are decoded anew at every step.
MEMORY_BYTES = 1 << 30


class Stack:
    """The `blocks` of the skeleton of `source`, in order; `calls[batch size]` has the other arguments of each."""

    def __init__(
        self,
        source: Source,
        blocks: Sequence[TunedBlock],
        calls: Mapping[int, Sequence[BlockCall]],
        device: torch.device,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.blocks = blocks
        self._source, self._calls, self._device, self._free = source, calls, device, memory_bytes
        self._held: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Inputs of every block for a batch at the first, `[batch, tokens, width]`, and at the end the last's output;
        on the CPU. Raises NumericalError naming the block whose output is not finite."""
        found = [hidden.cpu()]
        for depth, block in enumerate(self.blocks):
            with self._decoded(depth) as decoded:
                output = block.run(self._call(hidden, depth), found[-1].to(self._device), decoded)
            check_finite(output, block.name)
            found.append(output.cpu())
        return found

    def backward(self, inputs: list[Tensor], gradient: Tensor) -> None:
        """Add to the gradients of what is tuned; `inputs` are what `forward` gave but the last, and are used up."""
        gradient = gradient.to(self._device)
        for depth in reversed(range(len(self.blocks))):
            hidden = inputs.pop()
            with self._decoded(depth) as decoded:
                call = self._call(hidden, depth)
                gradient = self.blocks[depth].backward(call, hidden.to(self._device), gradient, decoded)

    def _call(self, batch: Tensor, depth: int) -> BlockCall:
        return self._calls[len(batch)][depth]

    @contextmanager
    def _decoded(self, depth: int) -> Iterator[dict[str, Tensor]]:
        """Matrices of a block, whose buffers are in memory meanwhile."""
        block = self.blocks[depth]
        decoded = self._held.get(depth)
        if decoded is None:
            decoded = block.decoded()
            size = sum(each.nbytes for each in decoded.values())
            if size <= self._free:
                self._free -= size
                self._held[depth] = decoded
        self._source.materialise(block.buffers)
        try:
            yield decoded
        finally:
            self._source.release(block.buffers)
