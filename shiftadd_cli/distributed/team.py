"""Communication between the processes of one run; a single process is a team of one.

Every process calls the same methods in the same order. Process number 0 writes files, and sends the others whatever it
has read or decided. This module does not depend on how the processes are connected.
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
    """A team of one. Tensors from another process arrive on the CPU, except for totals, which stay on their
    device."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is process number 0, which writes files."""
        return self.rank == 0

    def fault(self) -> str | None:
        """A sentence naming another process that has failed, or None."""
        return None

    def shards(self, batches: int) -> Shards:
        """The assignment of `batches` batches to processes."""
        return Shards(batches, self.rank, self.size)

    def share(self, value: T) -> T:
        """The value of the first process, which must be JSON-serializable; the values of the others are ignored."""
        return value

    def share_tensors(self, tensors: Tensors | None) -> Tensors:
        """The tensors of the first process; those of the others are ignored."""
        assert tensors is not None, "this is the first process"
        return tensors

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by process number; they must be JSON-serializable."""
        return [value]

    def exchange(self, mine: Tensors) -> list[Tensors]:
        """The tensors of all processes, by process number."""
        return [mine]

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a tensor to process number `rank`, which calls `receive`."""
        raise RuntimeError(f"a team of one has no process number {rank}")

    def receive(self, rank: int) -> Tensor:
        """The tensor that process number `rank` sends."""
        raise RuntimeError(f"a team of one has no process number {rank}")

    def add_in_order(self, totals: Sequence[Tensor], parts: Sequence[Tensor] | None, count: int) -> None:
        """Add to each total the part of process 0, then that of process 1, and so on, for the first `count` processes;
        the others pass None.

        In a team of several processes, each has only some rows of the totals until `complete` distributes them.
        """
        assert parts is not None, "one process has one part"
        for total, part in zip(totals, parts, strict=True):
            total += part

    def complete(self, totals: Sequence[Tensor]) -> None:
        """Distribute all rows of the totals to all processes."""

    def wait_for_first(self, work: Callable[[Callable[[], object]], T]) -> T | None:
        """The result of `work`, which the first process does alone while the others wait; they get None.

        work: gets a function that it calls regularly, before an exchange would time out, so that the others know that
        the first process is alive.
        """
        return work(lambda: None)

    def map(self, function: Callable[[T], Tensors], pieces: Sequence[T]) -> list[Tensors]:
        """The results of `function` for all pieces, in order. The processes share the work; each gets all results."""
        return map_pieces(function, pieces)


ALONE = Team()
