"""Cached hidden states between blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shiftadd_cli.distributed.team import Team


class HiddenStates:
    """The states of all calibration samples at one depth (see `blockwise.calls`), on the CPU, in batches of
    `batch_size`; the last batch may be smaller.

    partial: for a process of a team that has only some of the batches.
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
        """Replace this block's input by the next block's, so that two depths never exist at once."""
        self._batches[index] = batch.cpu()

    def __getitem__(self, index: int) -> Tensor:
        return self._batches[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches.values())

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size) if self._partial else len(self._batches)

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self)

    def hand_out(self, team: Team) -> None:
        """Send every process of the team the batches that it runs, from the first process."""
        self._pass(team, to_first=False)

    def collect(self, team: Team) -> None:
        """Send the batches of all other processes to the first."""
        self._pass(team, to_first=True)

    def _pass(self, team: Team, *, to_first: bool) -> None:
        shards = team.shards(len(self))
        for index in range(len(self)):
            owner = shards.owner(index)
            sender, receiver = (owner, 0) if to_first else (0, owner)
            if sender == receiver:
                continue
            if team.rank == sender:
                team.send(self[index], receiver)
            elif team.rank == receiver:
                self.replace(index, team.receive(sender))


def batch_span(index: int, batch_size: int, samples: int) -> slice:
    """The samples of batch number `index`; all batches except the last have `batch_size` samples."""
    first = index * batch_size
    return slice(first, min(first + batch_size, samples))


def is_whole(places: torch.Size, batch: int, tokens: int) -> bool:
    """Whether a linear sees every token of a batch, sample by sample. `places`: the axes of its input or output without
    the features. Within a sample the tokens may be in another order, as in windowed attention."""
    return places.numel() == batch * tokens and (len(places) == 1 or places[0] % batch == 0)
