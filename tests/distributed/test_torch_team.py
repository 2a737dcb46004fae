"""A team of processes does what a team of one does, to the bit."""

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
    totals = [torch.zeros_like(each) for each in parts_of(0)]
    for shards, batches in team.shards(SHARDS).rounds():
        team.add_in_order(totals, parts_of(batches[0]) if batches else None, len(shards))
    team.complete(totals)
    return [each.tolist() for each in totals]


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_one_process_to_the_bit(size: int) -> None:
    assert results(size, summed) == [summed(ALONE)] * size


def said(team: Team) -> list[Any]:
    tensors = {"a": torch.full((2, 3), team.rank, dtype=torch.bfloat16), "b": torch.zeros(0, dtype=torch.uint8)}
    exchanged = team.exchange(tensors)
    shared = team.share_tensors(tensors if team.first else None)
    return [
        team.share({"rank": team.rank, "none": None}),
        team.gather([team.rank, float("inf")]),
        [(float(each["a"].sum()), each["a"].dtype == torch.bfloat16, each["b"].shape[0]) for each in exchanged],
        float(shared["a"].sum()),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_all_hear_what_the_first_and_what_all_say(size: int) -> None:
    heard = results(size, said)
    everyone = [[rank, float("inf")] for rank in range(size)]
    expected = [{"rank": 0, "none": None}, everyone, [(6.0 * rank, True, 0) for rank in range(size)], 0.0]
    assert heard == [expected] * size
    assert said(ALONE) == [expected[0], everyone[:1], expected[2][:1], 0.0]


def mapped(team: Team) -> list[list[float]]:
    found = team.map(lambda piece: {"square": torch.tensor([piece**2]), "rank": torch.tensor([team.rank])}, [*range(5)])
    return [[float(each["square"]), float(each["rank"])] for each in found]


def test_pieces_are_shared_out_and_come_back_in_order() -> None:
    found = results(2, mapped)
    assert found[0] == found[1]
    assert [square for square, _ in found[0]] == [0, 1, 4, 9, 16]
    assert {rank for _, rank in found[0]} == {0, 1}


def passed(team: Team) -> float:
    if team.rank == 1:
        team.send(torch.arange(5.0, dtype=torch.float64), 0)
    return float(team.receive(1).sum()) if team.first else 0.0


def test_a_tensor_is_sent_from_one_to_another() -> None:
    assert results(3, passed) == [10.0, 0.0, 0.0]


def test_a_team_of_one_has_nobody_to_send_to() -> None:
    with pytest.raises(RuntimeError, match="no process number 1"):
        ALONE.send(torch.zeros(1), 1)
    with pytest.raises(RuntimeError, match="no process number 1"):
        ALONE.receive(1)
    assert ALONE.fault() is None
