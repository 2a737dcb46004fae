"""A team of processes computes what a team of one computes, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from team_runs import results
from torch import Tensor

from shiftadd_cli.distributed.team import ALONE, Team

SIZES = (2, 3)
SHARDS = 5


def parts_of(shard: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shard)
    floats = torch.randn(7, 3, generator=generator) * 10.0**shard
    return [floats, torch.randn(1, generator=generator), torch.tensor([shard + 1])]


def summed(team: Team) -> list[list[Any]]:
    totals = [torch.zeros_like(part) for part in parts_of(0)]
    for shards, batches in team.shards(SHARDS).rounds():
        team.add_in_order(totals, parts_of(batches[0]) if batches else None, len(shards))
    team.complete(totals)
    return [total.tolist() for total in totals]


@pytest.mark.parametrize("size", SIZES)
def test_sums_match_one_process_to_the_bit(size: int) -> None:
    assert results(size, summed) == [summed(ALONE)] * size


def exchanged_values(team: Team) -> list[Any]:
    tensors = {"a": torch.full((2, 3), team.rank, dtype=torch.bfloat16), "b": torch.zeros(0, dtype=torch.uint8)}
    exchanged = team.exchange(tensors)
    shared = team.share_tensors(tensors if team.first else None)
    return [
        team.share({"rank": team.rank, "none": None}),
        team.gather([team.rank, float("inf")]),
        [
            (float(received["a"].sum()), received["a"].dtype == torch.bfloat16, received["b"].shape[0])
            for received in exchanged
        ],
        float(shared["a"].sum()),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_all_processes_receive_shared_and_gathered_values(size: int) -> None:
    answers = results(size, exchanged_values)
    everyone = [[rank, float("inf")] for rank in range(size)]
    expected: list[Any] = [{"rank": 0, "none": None}, everyone, [(6.0 * rank, True, 0) for rank in range(size)], 0.0]
    assert answers == [expected] * size
    assert exchanged_values(ALONE) == [expected[0], everyone[:1], expected[2][:1], 0.0]


def mapped(team: Team) -> list[list[float]]:
    pieces = team.map(
        lambda piece: {"square": torch.tensor([piece**2]), "rank": torch.tensor([team.rank])}, [*range(5)]
    )
    return [[float(piece["square"]), float(piece["rank"])] for piece in pieces]


def test_pieces_are_distributed_and_returned_in_order() -> None:
    by_rank = results(2, mapped)
    assert by_rank[0] == by_rank[1]
    assert [square for square, _ in by_rank[0]] == [0, 1, 4, 9, 16]
    assert {rank for _, rank in by_rank[0]} == {0, 1}


def passed(team: Team) -> float:
    if team.rank == 1:
        team.send(torch.arange(5.0, dtype=torch.float64), 0)
    return float(team.receive(1).sum()) if team.first else 0.0


def test_tensor_is_sent_from_one_process_to_another() -> None:
    assert results(3, passed) == [10.0, 0.0, 0.0]


def test_team_of_one_has_no_process_to_send_to() -> None:
    with pytest.raises(RuntimeError, match="no process number 1"):
        ALONE.send(torch.zeros(1), 1)
    with pytest.raises(RuntimeError, match="no process number 1"):
        ALONE.receive(1)
    assert ALONE.fault() is None
