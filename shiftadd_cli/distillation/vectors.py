"""Norms and biases that are tuned: in float32, while the artifact and the model have types of their own for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Reader = Callable[[str], Tensor]
"""The tensor of that name in the artifact."""


class TunedVectors:
    """The one-dimensional parameters among `named`, as the artifact has them.

    Attributes:
        free: their values in float32, by name.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], read: Reader, device: torch.device) -> None:
        """named: parameters by name, of which the dtype is what the model computes with; read: takes these names."""
        self._computed = {name: each.dtype for name, each in named if each.ndim == 1 and each.is_floating_point()}
        stored = {name: read(name) for name in self._computed}
        self._stored = {name: each.dtype for name, each in stored.items()}
        # Copies: what is read may be the model's own.
        self.free = {name: nn.Parameter(each.to(device, torch.float32, copy=True)) for name, each in stored.items()}

    def stored(self) -> dict[str, Tensor]:
        """As they would be written, by name, detached."""
        return {name: each.detach().to(self._stored[name]) for name, each in self.free.items()}

    def computed(self) -> dict[str, Tensor]:
        """As the model would compute with what is written, by name, with their gradient."""
        return {name: each.to(self._stored[name]).to(self._computed[name]) for name, each in self.free.items()}
