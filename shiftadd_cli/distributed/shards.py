"""Which batches of the calibration samples each process of a team runs.

Floating-point sums depend on their order. So that one process and eight come to the same bytes, sums over batches are
always made of the sums of the same *shards*, added in the order of the shards; a team only decides who makes which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# More processes than this do not share the samples, only the rows; more shards mean more sums to exchange.
MOST_SHARDS = 8


@dataclass(frozen=True)
class Shards:
    """The shards of `batches` batches: as many as can be, at most `MOST_SHARDS`, of consecutive batches and nearly
    equal in number. Shard number i is that of the process i mod `size`; `rank` is the number of this one."""

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
        shard = next(each for each in range(len(self)) if batch in self.batches_of(each))
        return shard % self.size

    def own(self) -> Iterator[int]:
        """Numbers of the batches that this process runs, ascending."""
        for shard in range(self.rank, len(self), self.size):
            yield from self.batches_of(shard)

    def rounds(self) -> Iterator[tuple[range, range]]:
        """Rounds in which each process makes the sum of one shard at most: the shards of a round, and the batches of
        the one that is this process's, none where there is none left for it."""
        for first in range(0, len(self), self.size):
            shards = range(first, min(first + self.size, len(self)))
            mine = first + self.rank
            yield shards, self.batches_of(mine) if mine in shards else range(0)
