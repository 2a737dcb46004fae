"""Second moments of the inputs of a block's linears, H = E[w x xᵀ], gathered while the block runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from shiftadd_cli.blockwise.block_runner import BlockStream
from shiftadd_cli.blockwise.hidden_states import is_whole
from shiftadd_cli.calibration.products import add_products
from shiftadd_cli.distributed.team import Team
from shiftadd_cli.source.experts import place_in_mixture, tokens_of
from shiftadd_cli.source.linear import linear_sizes

# Relative rounding error of float32 sums over many tokens.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Moments:
    """Moments of one input x of linears: `hessian` E[x xᵀ], `mean` E[x] and, if there is an original to compare with,
    `cross` E[x̃ xᵀ] and `cross_mean` E[x̃], where x̃ is the input in the original model. Float32 `[in, in]` and `[in]`.
    `tokens`: number of tokens averaged over; without tokens, all moments are zeros."""

    hessian: Tensor
    mean: Tensor
    cross: Tensor | None = None
    cross_mean: Tensor | None = None
    tokens: int = 0

    def about_mean(self) -> Moments:
        """Moments of x − E[x] and x̃ − E[x̃]; constant inputs keep a trace of their power, above its rounding."""
        spread = self.hessian - torch.outer(self.mean, self.mean)
        trace = (_ROUNDING * self.hessian.diagonal() - spread.diagonal()).clamp_min(0)
        spread.diagonal().add_(trace)
        zero = torch.zeros_like(self.mean)
        if self.cross is None or self.cross_mean is None:
            return Moments(spread, zero, tokens=self.tokens)
        cross = self.cross - torch.outer(self.cross_mean, self.mean)
        # Otherwise their columns would appear to need other weights than the original's.
        cross.diagonal().add_(trace)
        return Moments(spread, zero, cross, zero, self.tokens)


class Inputs(Protocol):
    """Inputs of the modules of a block, batch by batch."""

    def inputs(self, index: int, names: Sequence[str], /) -> dict[str, Tensor]:
        """Inputs of the modules `names` (paths in the block) in batch number `index`, if they ran. The input of split
        experts is the numbers of the experts that tokens are sent to."""


class _Sum:
    """Σ x xᵀ, Σ x, Σ x̃ xᵀ and Σ x̃ over the tokens of a shard, and over all shards; see `distributed.shards`."""

    def __init__(self, width: int, device: torch.device, *, cross: bool) -> None:
        shapes = [(width, width), (width,)] * (2 if cross else 1)
        self._part = [torch.zeros(shape, device=device) for shape in shapes]
        self._total = [torch.zeros(shape, device=device) for shape in shapes]
        self._rows, self._all_rows = torch.zeros(2, 1, dtype=torch.int64)

    def add(self, inputs: Tensor, original: Tensor | None, weights: Tensor | None) -> None:
        weights = None if weights is None else weights.reshape(-1).to(inputs.device).float()
        rows = _rows_of(inputs)
        hessian, total, *cross_sums = self._part
        total += _weighted_sum(rows, weights)
        others = cross = None
        if cross_sums:
            cross, cross_total = cross_sums
            others = rows if original is None else _rows_of(original.to(inputs))
            cross_total += _weighted_sum(others, weights)
        add_products(rows, others, None if weights is None else weights.sqrt(), hessian, cross)
        self._rows += len(rows)

    def end_round(self, team: Team, shards: int) -> None:
        """Add the shards of the first `shards` processes of the team to the totals."""
        parts = [*self._part, self._rows]
        team.add_in_order([*self._total, self._all_rows], parts if team.rank < shards else None, shards)
        for part in parts:
            part.zero_()

    def mean(self, team: Team) -> Moments:
        team.complete([*self._total, self._all_rows])
        sums, rows = self._total, int(self._all_rows)
        upper = sums[0].triu()
        counted = max(rows, 1)
        hessian = (upper + upper.triu(1).T) / counted
        mean, *cross_means = (total / counted for total in sums[1:])
        cross, cross_mean = cross_means or (None, None)
        return Moments(hessian, mean, cross, cross_mean, rows)


def gather_moments(
    stream: BlockStream,
    groups: Sequence[tuple[str, ...]],
    original: Inputs | None = None,
    weights: Sequence[Tensor | None] | None = None,
) -> list[Moments]:
    """Run all batches and gather the moments of the input of each group of linears (see `shared_inputs`).

    The forward stops as soon as the last group has its input. With `original`, which gives the inputs of the same
    linears in the original model, the cross moments are gathered too. Each process of a team runs its own batches, and
    all get all moments.

    weights: for each group `[samples, tokens]` or None, not negative and of mean 1: a token's x xᵀ is multiplied by its
    weight (GuidedQuant, arXiv:2505.07004, section 3). Inputs that do not contain every token, see `is_whole` (experts
    read some of them), are not weighted.
    """
    team = stream.context.team
    names = [group[0] for group in groups]
    by_name = dict(zip(names, weights or (), strict=False))
    positions = {name: position for name in names if (position := place_in_mixture(stream.block, name)) is not None}
    # The routing is needed to match the tokens of an expert with those that it reads in the original.
    mixtures = [] if original is None else list(dict.fromkeys(mixture for mixture, _ in positions.values()))
    sums = {
        name: _Sum(_width(stream.block.get_submodule(name)), stream.device, cross=original is not None)
        for name in names
    }
    for shards, batches in team.shards(len(stream.hidden)).rounds():
        for index in batches:
            seen = stream.inputs(index, [*mixtures, *names])
            reference = {} if original is None else original.inputs(index, [*mixtures, *names])
            for name, moment_sum in sums.items():
                if (inputs := seen.get(name)) is None:
                    continue
                matched = _matched(inputs, reference.get(name), positions.get(name), seen, reference)
                moment_sum.add(inputs, matched, _weights_of(inputs, by_name.get(name), stream.span(index)))
        for moment_sum in sums.values():
            moment_sum.end_round(team, len(shards))
    return [moment_sum.mean(team) for moment_sum in sums.values()]


def _width(module: nn.Module) -> int:
    sizes = linear_sizes(module)
    assert sizes is not None, "only linears have moments"
    return sizes[1]


def _matched(
    inputs: Tensor,
    original: Tensor | None,
    position: tuple[str, int] | None,
    seen: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
) -> Tensor | None:
    """The input of a linear in the original, row by row for `inputs`; None where there is nothing to compare.

    position: mixture and number of the linear's expert, see `place_in_mixture`; `seen` and `reference` then include the
    routing of the mixture. The expert may receive other tokens than in the original; these count as unchanged.
    """
    if original is None:
        return None
    if position is None:
        return original if original.shape == inputs.shape else None
    mixture, expert = position
    now, then = (tokens_of(routing[mixture].to(inputs.device), expert) for routing in (seen, reference))
    matched = inputs.clone()
    matched[torch.isin(now, then)] = original.to(inputs)[torch.isin(then, now)]
    return matched


def _rows_of(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1])


def _weighted_sum(rows: Tensor, weights: Tensor | None) -> Tensor:
    """The sum over tokens, each multiplied by its weight."""
    return rows.sum(0, dtype=torch.float32) if weights is None else weights @ rows.float()


def _weights_of(inputs: Tensor, weights: Tensor | None, windows: slice) -> Tensor | None:
    if weights is None:
        return None
    rows = weights[windows]
    return rows if is_whole(inputs.shape[:-1], *rows.shape) else None
