"""A model with one block in memory at a time. Blocks are loaded and released only here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shiftadd_cli.context import ALONE_ON_CPU, Context
from shiftadd_cli.device import move_parts
from shiftadd_cli.source import Source, Structure


@dataclass(frozen=True)
class BlockwiseModel:
    """The model of `source`, split into the blocks of `structure` and run in `context`.

    The parts outside the blocks must be loaded while the model's own forward runs; see `outside`.
    """

    source: Source
    structure: Structure
    context: Context = ALONE_ON_CPU

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def skeleton(self) -> Any:
        """The model itself; its parts are on the meta device until they are loaded."""
        return self.source.skeleton()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks in the order they run."""
        return self.structure.blocks

    def at(self, dtype: torch.dtype) -> BlockwiseModel:
        """The same model in another dtype, with its own parameters."""
        return replace(self, source=self.source.at(dtype))

    def load(self, depth: int) -> nn.Module:
        """Block number `depth`, on the device until it is released; a loaded block is left unchanged."""
        self.source.materialise([self.names[depth]])
        block: nn.Module = self.skeleton.get_submodule(self.names[depth])
        return block.to(self.device)

    def release(self, depth: int) -> None:
        """Free the weights of a block."""
        self.source.release([self.names[depth]])

    def blocks(self, description: str, *, backward: bool = False) -> Iterator[tuple[int, str, nn.Module]]:
        """Number, name and module of each block, loaded while it is in use, in order or `backward`. The progress is
        shown under `description`."""
        order = range(len(self.names))[::-1] if backward else range(len(self.names))
        names = self.context.progress([self.names[depth] for depth in order], description)
        for depth, name in zip(order, names, strict=True):
            block = self.load(depth)
            try:
                yield depth, name, block
            finally:
                self.release(depth)

    def load_outside(self, more: Sequence[str] = ()) -> list[str]:
        """Load the parts outside the blocks, and those named in `more`, on the device; returns the names of all."""
        names = [*self.structure.outside, *more]
        self.source.materialise(names)
        move_parts(self.skeleton, names, self.device)
        return names

    @contextmanager
    def outside(self, more: Sequence[str] = ()) -> Iterator[None]:
        """Keep the parts of `load_outside` on the device within the context."""
        names = self.load_outside(more)
        try:
            yield
        finally:
            self.source.release(names)
