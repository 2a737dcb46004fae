"""Assignment of batches of the calibration samples to the processes of a team.

Floating-point sums depend on their order. So that one process and eight produce the same bytes, a sum over batches is
always the sum of the same *shards*, added in shard order; the team only decides which process computes which shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Processes beyond this number share only the rows, not the samples; more shards mean more sums to exchange.
MOST_SHARDS = 8


@dataclass(frozen=True)
class Shards:
    """The shards of `batches` batches: as many as possible, at most `MOST_SHARDS`, each of consecutive batches and
    nearly equal in size. Process i mod `size` owns shard number i; `rank` is the number of this process."""

    batches: int
    rank: int = 0
    size: int = 1

    def __len__(self) -> int:
        return min(self.batches, MOST_SHARDS)

    def batches_of(self, shard: int) -> range:
        """Numbers of the batches of a shard."""
        return range(shard * self.batches // len(self), (shard + 1) * self.batches // len(self))

    def owner(self, batch: int) -> int:
        """The process that runs a batch."""
        owning = next(shard for shard in range(len(self)) if batch in self.batches_of(shard))
        return owning % self.size

    def own(self) -> Iterator[int]:
        """Numbers of the batches that this process runs, ascending."""
        for shard in range(self.rank, len(self), self.size):
            yield from self.batches_of(shard)

    def rounds(self) -> Iterator[tuple[range, range]]:
        """Rounds in which each process computes the sum of at most one shard. Yields the shards of the round, and the
        batches of this process's shard, which are empty if it has none."""
        for first in range(0, len(self), self.size):
            shards = range(first, min(first + self.size, len(self)))
            mine = first + self.rank
            yield shards, self.batches_of(mine) if mine in shards else range(0)
