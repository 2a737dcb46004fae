"""Every batch is run exactly once, by whichever process."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.distributed.shards import MOST_SHARDS, Shards

BATCHES, SIZES = st.integers(1, 40), st.integers(1, 12)


@given(BATCHES, SIZES)
def test_every_batch_has_one_owner_who_runs_it(batches: int, size: int) -> None:
    owners = [Shards(batches).owner(index) % size for index in range(batches)]
    for rank in range(size):
        own = list(Shards(batches, rank, size).own())
        assert own == sorted(own)
        assert own == [index for index in range(batches) if Shards(batches, rank, size).owner(index) == rank]
    assert len(owners) == batches
    assert sum(len(list(Shards(batches, rank, size).own())) for rank in range(size)) == batches


@given(BATCHES, SIZES)
def test_rounds_give_the_shards_of_one_process_in_order(batches: int, size: int) -> None:
    alone = [indices for _, indices in Shards(batches).rounds()]
    by_rank = [list(Shards(batches, rank, size).rounds()) for rank in range(size)]
    together = []
    for parts in zip(*by_rank, strict=True):
        (count,) = {len(shards) for shards, _ in parts}
        assert all(not indices for _, indices in parts[count:])
        together += [indices for _, indices in parts[:count]]
    assert together == alone
    assert [index for indices in alone for index in indices] == list(range(batches))
    assert len(alone) == min(batches, MOST_SHARDS)
    assert max(map(len, alone)) - min(map(len, alone)) <= 1
