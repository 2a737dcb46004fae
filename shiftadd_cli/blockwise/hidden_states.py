"""Cached hidden states between blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from shiftadd_cli.distributed.team import Team

States = TypeVar("States", bound="HiddenStates")


class HiddenStates:
    """The states of all calibration samples at one depth (see `blockwise.calls`), in batches of `batch_size` but for
    the last, on the CPU.

    partial: for a process of a team that holds some of the batches.
    """

    def __init__(self, samples: int, batch_size: int, *, partial: bool = False) -> None:
        self.samples, self.batch_size, self._partial = samples, batch_size, partial
        self._batches: dict[int, Tensor] = {}

    def span(self, index: int) -> slice:
        """The samples of a batch."""
        return batch_span(index, self.batch_size, self.samples)

    def append(self, batch: Tensor) -> None:
        """Add a batch `[batch, tokens, width]`."""
        self._batches[len(self._batches)] = batch.cpu()

    def replace(self, index: int, batch: Tensor) -> None:
        """Put the next block's input in the place of this one's, so that two depths never exist at once."""
        self._batches[index] = batch.cpu()

    def __getitem__(self, index: int) -> Tensor:
        return self._batches[index]

    def copy(self: States) -> States:
        """The same batches, to be replaced independently; nothing is duplicated until then."""
        twin = type(self)(self.samples, self.batch_size, partial=self._partial)
        twin._batches = dict(self._batches)
        return twin

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches.values())

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size) if self._partial else len(self._batches)

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self)

    def hand_out(self, team: Team) -> None:
        """Give every process of the team the batches that it runs, of those that the first has."""
        self._pass(team, to_first=False)

    def collect(self, team: Team) -> None:
        """Give the first process the batches of all others."""
        self._pass(team, to_first=True)

    def _pass(self, team: Team, *, to_first: bool) -> None:
        shards = team.shards(len(self))
        for index in range(len(self)):
            owner = shards.owner(index)
            giver, taker = (owner, 0) if to_first else (0, owner)
            if giver == taker:
                continue
            if team.rank == giver:
                team.send(self[index], taker)
            elif team.rank == taker:
                self.replace(index, team.receive(giver))


def batch_span(index: int, batch_size: int, samples: int) -> slice:
    """The samples of batch number `index`; all batches have `batch_size` samples but for the last."""
    first = index * batch_size
    return slice(first, min(first + batch_size, samples))


def is_whole(places: torch.Size, batch: int, tokens: int) -> bool:
    """Whether a linear whose input or output has these axes besides the features sees every token of a batch, sample
    after sample. Inside a sample they may lie in an order of the linear's own, as where attention runs in windows."""
    return places.numel() == batch * tokens and (len(places) == 1 or places[0] % batch == 0)
