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

    Adam divides each entry by its own squared gradient, so every weight moves equally far. Most latent weights have
    only noise as their gradient, and would all cross their midpoints together. With row and column means, the movement
    of a weight depends on its gradient relative to its row and column.
    """

    def __init__(self, groups: Iterable[dict[str, object]]) -> None:
        """groups: dicts of `params` (matrices) and `lr`, the distance that a typical entry moves per step."""
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
# One in this many batches is held out.
_HELD_BACK = 8


def hold_back(batches: int) -> tuple[list[int], list[int]]:
    """Numbers of the batches to tune on, and of the held-out batches, the last ones. Needs at least two batches."""
    numbers = list(range(batches))
    count = max(1, batches // _HELD_BACK)
    return numbers[:-count], numbers[-count:]


def rising_and_falling(steps: int) -> Callable[[int], float]:
    """Learning rate factor by step, for `steps` steps: a short warm-up, then a linear decay to zero."""
    return lambda step: min(1, (step + 1) / _WARM_UP_STEPS) * (1 - step / steps)
