"""How far predictions are from the original's."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from shiftadd_cli.blockwise.forward import Prediction

# Relative difference of predictions of one model, by what it computes in: kernels add in different orders, and one of
# the two may be computed in float32. A model that was loaded or run wrongly differs by the order of 1.
_ROUNDING = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.2}
# Predictions that are in float32 at a time.
_SLICE = 64


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


def relative_difference(values: Tensor, expected: Tensor) -> float:
    """How far predictions `[..., classes]` are from those expected, relative to how far these are from their means.

    Zero where all classes of a prediction differ by the same, which changes nothing.
    """
    difference = scale = 0.0
    for own, other in zip(values.flatten(0, -2).split(_SLICE), expected.flatten(0, -2).split(_SLICE), strict=True):
        own, other = own.float(), other.to(own.device).float()
        difference += _spread(own - other)
        scale += _spread(other)
    return (difference / max(scale, 1e-60)) ** 0.5


def rounding_of(dtype: torch.dtype) -> float:
    """The largest `relative_difference` that rounding explains in a model that computes in `dtype`."""
    return _ROUNDING.get(dtype, _ROUNDING[torch.float32])


def _spread(values: Tensor) -> float:
    """Squared distance from the mean over classes."""
    return float((values - values.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))
