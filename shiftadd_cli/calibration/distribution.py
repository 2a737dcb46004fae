"""How far predictions are from the original's."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from shiftadd_cli.calibration.forward import Prediction


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


class Divergence(Protocol):
    """The original's predictions on some rows."""

    def divergence(self, prediction: Tensor, /) -> Tensor:
        """How far another model's predictions are, `[...]`; not negative but for rounding."""


class Direction:
    """The original's features on some rows, float32 `[..., width]`, of which only the direction counts."""

    def __init__(self, features: Tensor) -> None:
        self._units = torch.nn.functional.normalize(features, dim=-1)

    def divergence(self, features: Tensor) -> Tensor:
        """1 - cosine of each row with the original's, `[...]`."""
        # As half the squared distance of unit vectors, which has no difference of numbers near 1.
        units = torch.nn.functional.normalize(features.to(self._units.device), dim=-1)
        return 0.5 * (units - self._units).square().sum(-1)


def comparable(prediction: Prediction) -> Tensor:
    """What a `Divergence` compares: log-probabilities, float32 `[..., classes]`, or features, float32."""
    values = prediction.values.float()
    return values.log_softmax(-1) if prediction.is_logits else values


def reference_of(prediction: Prediction) -> Divergence:
    """The original's side of the comparison."""
    return Reference(comparable(prediction)) if prediction.is_logits else Direction(comparable(prediction))
