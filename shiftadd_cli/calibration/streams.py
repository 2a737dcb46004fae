"""Cached hidden states between blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class HiddenStates:
    """The hidden states of all calibration samples at one depth, in batches, on the CPU in the model's dtype."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._batches: list[Tensor] = []

    def append(self, batch: Tensor) -> None:
        """Add a batch `[batch, tokens, width]`."""
        self._batches.append(batch.cpu())

    def replace(self, index: int, batch: Tensor) -> None:
        """Put the next block's input in the place of this one's, so that two depths never exist at once."""
        self._batches[index] = batch.cpu()

    def __getitem__(self, index: int) -> Tensor:
        return self._batches[index]

    def copy(self) -> HiddenStates:
        """The same batches, to be replaced independently; nothing is duplicated until then."""
        twin = HiddenStates(self.samples)
        twin._batches = list(self._batches)
        return twin

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self._batches)


def is_whole(places: torch.Size, batch: int, tokens: int) -> bool:
    """Whether a linear whose input or output has these axes besides the features sees every token of a batch, sample
    after sample. Inside a sample they may lie in an order of the linear's own, as where attention runs in windows."""
    return places.numel() == batch * tokens and (len(places) == 1 or places[0] % batch == 0)
