"""Second moments of the inputs of a block's linears, H = E[w x xᵀ], gathered while the block runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.calibration.stream import BlockStream
from shiftadd_cli.calibration.streams import is_whole

# Columns of a second moment that are added to at once.
_STRIP = 256
# Of sums over many tokens in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Moments:
    """Of one input x of linears: `hessian` E[x xᵀ], `mean` E[x], and, when there is an original to compare with,
    `cross` E[x̃ xᵀ], with x̃ what the linears read in the original model. Float32 `[in, in]`, and `[in]`."""

    hessian: Tensor
    mean: Tensor
    cross: Tensor | None = None

    def about_mean(self) -> Tensor:
        """E[(x − E[x]) (x − E[x])ᵀ]; inputs that never change keep a trace of their power, above its rounding."""
        spread = self.hessian - torch.outer(self.mean, self.mean)
        spread.diagonal().clamp_(min=_ROUNDING * self.hessian.diagonal())
        return spread


class _Sum:
    """Accumulates Σ x xᵀ, Σ x and Σ x̃ xᵀ over tokens."""

    def __init__(self, width: int, device: torch.device, *, cross: bool) -> None:
        self.hessian = torch.zeros(width, width, device=device)
        self.total = torch.zeros(width, device=device)
        self.cross = torch.zeros(width, width, device=device) if cross else None
        self.rows = 0

    def add(self, inputs: Tensor, original: Tensor | None, weights: Tensor | None) -> None:
        # The root on both sides: the result is symmetric and positive whatever the rounding.
        root = None if weights is None else weights.reshape(-1, 1).to(inputs.device).sqrt()
        rows = _rows(inputs, root)
        # The matrix is symmetric: strips from the diagonal rightwards are little more than half the work.
        for start in range(0, rows.shape[1], _STRIP):
            self.hessian[start : start + _STRIP, start:].addmm_(rows[:, start : start + _STRIP].T, rows[:, start:])
        self.total += rows.sum(0) if root is None else root.view(-1) @ rows
        if self.cross is not None:
            unspoilt = rows
            # Experts may be given other tokens than in the original; such a batch says nothing about the difference.
            if original is not None and original.shape == inputs.shape:
                unspoilt = _rows(original, root)
            self.cross.addmm_(unspoilt.T, rows)
        self.rows += len(rows)

    def mean(self) -> Moments:
        upper = self.hessian.triu()
        hessian = (upper + upper.triu(1).T) / self.rows
        return Moments(hessian, self.total / self.rows, None if self.cross is None else self.cross / self.rows)


def gather_moments(
    stream: BlockStream,
    groups: Sequence[tuple[str, ...]],
    original: BlockStream | None = None,
    weights: Sequence[Tensor] | None = None,
) -> list[Moments]:
    """Run all batches and gather the moments of the input of each group of linears (see `shared_inputs`).

    The block is left as soon as the last of them has its input. With `original`, the same block before quantization
    and the hidden states of the original model, the cross moments are gathered too.

    weights: for each group `[samples, tokens]`, not negative and of mean 1: a token's x xᵀ counts by its weight
    (GuidedQuant, arXiv:2505.07004, section 3). Inputs that do not hold every token, see `is_whole` (experts read some
    of them), are not weighted.
    """
    names = [group[0] for group in groups]
    by_name = dict(zip(names, weights or (), strict=False))
    sums: dict[str, _Sum] = {}
    first = 0
    for index, batch in enumerate(stream.hidden):
        windows = slice(first, first := first + len(batch))
        seen = stream.inputs(index, names)
        reference = {} if original is None else original.inputs(index, names)
        for name, inputs in seen.items():
            if name not in sums:
                sums[name] = _Sum(inputs.shape[-1], stream.device, cross=original is not None)
            sums[name].add(inputs, reference.get(name), _weights_of(inputs, by_name.get(name), windows))
    return [sums[name].mean() for name in names]


def _rows(inputs: Tensor, root: Tensor | None) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows if root is None else rows * root


def _weights_of(inputs: Tensor, weights: Tensor | None, windows: slice) -> Tensor | None:
    if weights is None:
        return None
    rows = weights[windows]
    return rows if is_whole(inputs.shape[:-1], *rows.shape) else None
