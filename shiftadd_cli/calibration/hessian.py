"""Second moments of the inputs of a block's linears, H = E[w x xᵀ], gathered while the block runs.

For a linear that adds its output to the hidden states, the *drift* is also gathered: E[w (h̃ − h) xᵀ], where h are the
hidden states after the addition and h̃ those of the original model. They differ because earlier layers are quantized.
"""

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
# Tokens that determine a second moment well enough to compare errors in it, or to fit the many rows of a head to it: at
# least this many, and as many for each input.
_TOKENS = 16384
_TOKENS_PER_INPUT = 8


def sufficient_tokens(inputs: int) -> int:
    """Tokens that are enough for the second moment of so many inputs where not all are worth their time."""
    return max(_TOKENS, _TOKENS_PER_INPUT * inputs)


@dataclass(frozen=True)
class Moments:
    """Moments of one input x of linears: `hessian` E[x xᵀ], `mean` E[x] and, if there is an original to compare with,
    either `cross` E[x̃ xᵀ] and `cross_mean` E[x̃], where x̃ is the input in the original model, or `drift` E[(h̃ − h) xᵀ]
    and `drift_mean` E[h̃ − h]. Float32 `[in, in]` and `[in]`, of the drift `[out, in]` and `[out]`. `tokens`: number of
    tokens averaged over; without tokens, all moments are zeros."""

    hessian: Tensor
    mean: Tensor
    cross: Tensor | None = None
    cross_mean: Tensor | None = None
    tokens: int = 0
    drift: Tensor | None = None
    drift_mean: Tensor | None = None

    def about_mean(self) -> Moments:
        """Moments of x − E[x], x̃ − E[x̃] and h̃ − h − E[h̃ − h]; constant inputs keep a trace of their power, above its
        rounding."""
        spread = self.hessian - torch.outer(self.mean, self.mean)
        trace = (_ROUNDING * self.hessian.diagonal() - spread.diagonal()).clamp_min(0)
        spread.diagonal().add_(trace)
        zero = torch.zeros_like(self.mean)
        if self.drift is not None and self.drift_mean is not None:
            drift = self.drift - torch.outer(self.drift_mean, self.mean)
            return Moments(spread, zero, tokens=self.tokens, drift=drift, drift_mean=torch.zeros_like(self.drift_mean))
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


class MomentSum:
    """Σ x xᵀ and Σ x over the tokens of a shard, and over all shards, see `distributed.shards`; with `cross` also
    Σ x̃ xᵀ and Σ x̃, or with `drift` Σ (h̃ − h) xᵀ and Σ (h̃ − h)."""

    def __init__(self, width: int, device: torch.device, *, cross: bool, drift: int = 0) -> None:
        """cross: of inputs; drift: width of the hidden states, 0 without drift. Only one of both."""
        shapes: list[tuple[int, ...]] = [(width, width), (width,)]
        if other := drift or (width if cross else 0):
            shapes += [(other, width), (other,)]
        self._drift = bool(drift)
        self._part = [torch.zeros(shape, device=device) for shape in shapes]
        self._total = [torch.zeros(shape, device=device) for shape in shapes]
        self._rows, self._all_rows = torch.zeros(2, 1, dtype=torch.int64)

    def add(self, inputs: Tensor, compared: Tensor | None, weights: Tensor | None) -> None:
        """Add the tokens of a batch. compared: their x̃ or h̃ − h; None counts as x̃ = x and h̃ = h."""
        weights = None if weights is None else weights.reshape(-1).to(inputs.device).float()
        rows = _rows_of(inputs)
        hessian, total, *others = self._part
        total += _weighted_sum(rows, weights)
        read = cross = None
        if others and not self._drift:
            cross, cross_total = others
            read = rows if compared is None else _rows_of(compared.to(inputs))
            cross_total += _weighted_sum(read, weights)
        add_products(rows, read, None if weights is None else weights.sqrt(), hessian, cross)
        if self._drift and compared is not None:
            drift, drift_total = others
            drifts = _rows_of(compared.to(inputs.device)).float()
            drift_total += _weighted_sum(drifts, weights)
            drift.addmm_((drifts if weights is None else drifts * weights.unsqueeze(1)).T, rows.float())
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
        mean, *others = (total / counted for total in sums[1:])
        matrix, vector = others or (None, None)
        if self._drift:
            return Moments(hessian, mean, tokens=rows, drift=matrix, drift_mean=vector)
        return Moments(hessian, mean, matrix, vector, rows)


def gather_moments(
    stream: BlockStream,
    groups: Sequence[tuple[str, ...]],
    original: Inputs | None = None,
    weights: Sequence[Tensor | None] | None = None,
    junctions: Mapping[str, str] | None = None,
) -> list[Moments]:
    """Run all batches and gather the moments of the input of each group of linears (see `shared_inputs`).

    The forward stops as soon as the last group has its input. With `original`, which gives the inputs of the same
    linears in the original model, the cross moments are gathered too. Each process of a team runs its own batches, and
    all get all moments.

    junctions: see `find_junctions`; only of linears that are alone in their group, and only with `original`. These
    linears get their drift in place of the cross moments.
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
    readers = {name: junctions[name] for name in names if junctions is not None and name in junctions}
    sums = {}
    for name in names:
        rows, columns = _sizes(stream.block.get_submodule(name))
        drift = rows if name in readers else 0
        sums[name] = MomentSum(columns, stream.device, cross=original is not None and not drift, drift=drift)
    for shards, batches in team.shards(len(stream.hidden)).rounds():
        for index in batches:
            watched = [*mixtures, *names, *dict.fromkeys(readers.values())]
            seen = stream.inputs(index, watched)
            reference = {} if original is None else original.inputs(index, watched)
            for name, moment_sum in sums.items():
                if (inputs := seen.get(name)) is None:
                    continue
                if name in readers:
                    matched = _drift(seen.get(readers[name]), reference.get(readers[name]), inputs)
                else:
                    matched = _matched(inputs, reference.get(name), positions.get(name), seen, reference)
                moment_sum.add(inputs, matched, _weights_of(inputs, by_name.get(name), stream.span(index)))
        for moment_sum in sums.values():
            moment_sum.end_round(team, len(shards))
    return [moment_sum.mean(team) for moment_sum in sums.values()]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear."""
    sizes = linear_sizes(module)
    assert sizes is not None, "only linears have moments"
    return sizes[0], sizes[1]


def _drift(current: Tensor | None, original: Tensor | None, inputs: Tensor) -> Tensor | None:
    """h̃ − h, float32, token by token for `inputs`; None where there is nothing to compare."""
    if current is None or original is None or current.shape != original.shape:
        return None
    if current.shape[:-1].numel() != inputs.shape[:-1].numel():
        return None
    return original.to(current.device).float() - current.float()


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
