"""How far predictions are from the original's."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Reference:
    """The original's distribution on some rows, from log-probabilities, float32 `[..., vocabulary]`."""

    def __init__(self, chances: Tensor) -> None:
        self._chances = chances
        self._probabilities = chances.exp()

    @cached_property
    def top(self) -> Tensor:
        """The most probable token of each row, int64 `[...]`."""
        return self._chances.argmax(-1)

    def divergence(self, chances: Tensor) -> Tensor:
        """KL(original || model) of each row in nats, `[...]`, from the model's log-probabilities."""
        # Difference first: a KL is far smaller than the two entropies it could be taken from.
        gap = self._chances - chances.to(self._chances.device)
        found = (gap * self._probabilities).sum(-1)
        if not torch.isfinite(found).all():
            # What the original rules out (minus infinity) counts nothing, as in the limit of p log p.
            found = gap.masked_fill_(self._probabilities == 0, 0.0).mul_(self._probabilities).sum(-1)
        return found
