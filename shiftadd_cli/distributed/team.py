"""What processes that work on one run have to say to each other; a process by itself is a team of one.

Every process calls the same methods in the same order. Process number 0 writes, and tells the others what it has read
or decided. Nothing here depends on how the processes are connected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from shiftadd_cli.distributed.parallel import map_pieces
from shiftadd_cli.distributed.shards import Shards

T = TypeVar("T")
Tensors = dict[str, Tensor]


class Team:
    """A team of one. Tensors that come from another process are on the CPU, but for totals, which stay where
    they are."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def fault(self) -> str | None:
        """Which other process has failed, in a sentence."""
        return None

    def shards(self, batches: int) -> Shards:
        """Who runs which of so many batches."""
        return Shards(batches, self.rank, self.size)

    def share(self, value: T) -> T:
        """The value that the first process gives, which JSON can hold; the others' does not matter."""
        return value

    def share_tensors(self, tensors: Tensors | None) -> Tensors:
        """The tensors that the first process gives; the others' do not matter."""
        assert tensors is not None, "this is the first process"
        return tensors

    def gather(self, value: T) -> list[T]:
        """The values that all processes give, which JSON can hold, by the number of the process."""
        return [value]

    def exchange(self, mine: Tensors) -> list[Tensors]:
        """What every process gives, by its number."""
        return [mine]

    def send(self, tensor: Tensor, rank: int) -> None:
        """Give a tensor to process number `rank`, which calls `receive`."""
        raise RuntimeError(f"a team of one has no process number {rank}")

    def receive(self, rank: int) -> Tensor:
        """The tensor that process number `rank` sends."""
        raise RuntimeError(f"a team of one has no process number {rank}")

    def add_in_order(self, totals: Sequence[Tensor], parts: Sequence[Tensor] | None, count: int) -> None:
        """Add to each total the part of process 0, then that of 1, and so on, up to `count` processes, which have one;
        the others give None.

        In a team of several each process keeps some rows of the totals only, until `complete` hands them out.
        """
        assert parts is not None, "one process has one part"
        for total, part in zip(totals, parts, strict=True):
            total += part

    def complete(self, totals: Sequence[Tensor]) -> None:
        """Make all rows of the totals known to all."""

    def map(self, function: Callable[[T], Tensors], pieces: Sequence[T]) -> list[Tensors]:
        """`function` of every piece, in order; pieces are shared out, and all get all results."""
        return map_pieces(function, pieces)


ALONE = Team()
