"""Gradient descent with momentum for latent weights, scaled by a factored second moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

_MOMENTUM = 0.9
_SECOND_MOMENT = 0.95


class FactoredDescent(Optimizer):
    """Matrices move by lr · m / √v, where m is the running mean of the gradient and v the rank-one estimate of its
    square from row and column means (Adafactor, Shazeer and Stern 2018, arXiv:1804.04235, section 3).

    The square of one entry's own gradient, as Adam takes it, makes every weight move as far as every other. Most
    latent weights have nothing but noise for a gradient; then they all cross their midpoints together. With row and
    column means a weight moves as its gradient compares with those of its row and column.
    """

    def __init__(self, groups: Iterable[dict[str, object]]) -> None:
        """groups: dicts of `params` (matrices) and `lr`, the distance a typical entry moves per step."""
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self._direction(parameter), alpha=group["lr"])

    def _direction(self, parameter: Tensor) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["steps"] = 0
            state["mean"] = torch.zeros_like(gradient)
            state["rows"] = gradient.new_zeros(len(gradient), 1)
            state["columns"] = gradient.new_zeros(1, gradient.shape[1])
        state["steps"] += 1
        square = gradient.square()
        state["mean"].lerp_(gradient, 1 - _MOMENTUM)
        state["rows"].lerp_(square.mean(1, keepdim=True), 1 - _SECOND_MOMENT)
        state["columns"].lerp_(square.mean(0, keepdim=True), 1 - _SECOND_MOMENT)
        # Both running means start at zero.
        mean_bias = 1 - _MOMENTUM ** state["steps"]
        bias = 1 - _SECOND_MOMENT ** state["steps"]
        rows, columns = state["rows"] / bias, state["columns"] / bias
        root = (rows / rows.mean().clamp_min(1e-38)).sqrt() * columns.sqrt()
        return torch.where(root > 0, state["mean"] / mean_bias / root, 0.0)


_WARM_UP_STEPS = 5
# One in so many batches is held back.
_HELD_BACK = 8


def hold_back(batches: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to tune on, and of those, the last, that decide whether it helped. Of two at least."""
    numbers = list(range(batches))
    kept = max(1, batches // _HELD_BACK)
    return numbers[:-kept], numbers[-kept:]


def rising_and_falling(steps: int) -> Callable[[int], float]:
    """Share of the rate at step 0, 1, ... of so many: up in a few steps, then down to nothing linearly."""
    return lambda step: min(1, (step + 1) / _WARM_UP_STEPS) * (1 - step / steps)
