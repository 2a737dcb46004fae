"""Tuned norms and biases: float32 during tuning, whatever their dtypes in the artifact and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Reader = Callable[[str], Tensor]
"""The tensor of that name in the artifact."""


class TunedVectors:
    """The one-dimensional parameters among `named`, with their values from the artifact.

    Attributes:
        free: their values in float32, by name.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], read: Reader, device: torch.device) -> None:
        """named: parameters by name, in the compute dtype of the model; read: takes these names."""
        self._computed = {
            name: parameter.dtype for name, parameter in named if parameter.ndim == 1 and parameter.is_floating_point()
        }
        stored = {name: read(name) for name in self._computed}
        self._stored = {name: tensor.dtype for name, tensor in stored.items()}
        # Copies, since `read` may return the model's own tensors.
        self.free = {name: nn.Parameter(tensor.to(device, torch.float32, copy=True)) for name, tensor in stored.items()}

    def stored(self) -> dict[str, Tensor]:
        """The vectors in their stored dtype, by name, detached."""
        return {name: vector.detach().to(self._stored[name]) for name, vector in self.free.items()}

    def computed(self) -> dict[str, Tensor]:
        """The vectors as the model computes with them after storing, by name, with their gradient."""
        return {name: vector.to(self._stored[name]).to(self._computed[name]) for name, vector in self.free.items()}
