"""The distance of predictions from the original's."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from shiftadd_cli.blockwise.forward import Prediction

# Largest relative difference between predictions of one model, by its dtype: kernels add in different orders, and one
# of the two may be computed in float32. A model that was loaded or run wrongly differs by the order of 1.
_ROUNDING = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.2}
# Predictions that are converted to float32 at a time.
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
        # Subtract first: a KL is far smaller than the two entropies whose difference it is.
        gap = self._chances - chances.to(self._chances.device)
        values = (gap * self._probabilities).sum(-1)
        if not torch.isfinite(values).all():
            # Tokens that the original rules out (minus infinity) add nothing, as in the limit of p log p.
            values = gap.masked_fill_(self._probabilities == 0, 0.0).mul_(self._probabilities).sum(-1)
        return values


class Divergence(Protocol):
    """The original's predictions on some rows."""

    def divergence(self, prediction: Tensor, /) -> Tensor:
        """The distance of another model's predictions, `[...]`; negative only by rounding."""


class Direction:
    """The original's features on some rows, float32 `[..., width]`; only their direction counts."""

    def __init__(self, features: Tensor) -> None:
        self._units = torch.nn.functional.normalize(features, dim=-1)

    def divergence(self, features: Tensor) -> Tensor:
        """1 - cosine between each row and the original's, `[...]`."""
        # Half the squared distance of unit vectors, which avoids a difference of numbers near 1.
        units = torch.nn.functional.normalize(features.to(self._units.device), dim=-1)
        return 0.5 * (units - self._units).square().sum(-1)


def comparable(prediction: Prediction) -> Tensor:
    """The values that a `Divergence` compares: log-probabilities, float32 `[..., classes]`, or features, float32."""
    values = prediction.values.float()
    return values.log_softmax(-1) if prediction.is_logits else values


def reference_of(prediction: Prediction) -> Divergence:
    """The original's side of the comparison."""
    return Reference(comparable(prediction)) if prediction.is_logits else Direction(comparable(prediction))


def relative_difference(values: Tensor, expected: Tensor) -> float:
    """The distance of predictions `[..., classes]` from the expected ones, relative to the spread of the expected ones.

    A prediction whose classes all differ by the same amount counts as equal, because that changes nothing.
    """
    difference = scale = 0.0
    for actual, target in zip(values.flatten(0, -2).split(_SLICE), expected.flatten(0, -2).split(_SLICE), strict=True):
        actual, target = actual.float(), target.to(actual.device).float()
        difference += _spread(actual - target)
        scale += _spread(target)
    return (difference / max(scale, 1e-60)) ** 0.5


def rounding_of(dtype: torch.dtype) -> float:
    """The largest `relative_difference` that rounding explains in a model that computes in `dtype`."""
    return _ROUNDING.get(dtype, _ROUNDING[torch.float32])


def _spread(values: Tensor) -> float:
    """Squared distance from the mean over classes."""
    return float((values - values.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))
