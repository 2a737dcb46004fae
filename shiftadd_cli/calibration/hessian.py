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
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.source.experts import place_in_mixture, tokens_of
from shiftadd_cli.source.linear import linear_sizes

# Of sums over many tokens in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Moments:
    """Of one input x of linears: `hessian` E[x xᵀ], `mean` E[x], and, when there is an original to compare with,
    `cross` E[x̃ xᵀ] and `cross_mean` E[x̃], with x̃ what the linears read in the original model. Float32 `[in, in]`, and
    `[in]`. `tokens`: how many they are means over; zeros where there were none."""

    hessian: Tensor
    mean: Tensor
    cross: Tensor | None = None
    cross_mean: Tensor | None = None
    tokens: int = 0

    def about_mean(self) -> Moments:
        """Of x − E[x] and x̃ − E[x̃]; inputs that never change keep a trace of their power, above its rounding."""
        spread = self.hessian - torch.outer(self.mean, self.mean)
        trace = (_ROUNDING * self.hessian.diagonal() - spread.diagonal()).clamp_min(0)
        spread.diagonal().add_(trace)
        nothing = torch.zeros_like(self.mean)
        if self.cross is None or self.cross_mean is None:
            return Moments(spread, nothing, tokens=self.tokens)
        cross = self.cross - torch.outer(self.cross_mean, self.mean)
        # Or their columns would seem to want other weights than the original's.
        cross.diagonal().add_(trace)
        return Moments(spread, nothing, cross, nothing, self.tokens)


class Inputs(Protocol):
    """What the modules of a block read, batch by batch."""

    def inputs(self, index: int, names: Sequence[str], /) -> dict[str, Tensor]:
        """Of batch number `index` and the modules `names` (paths in the block), those that ran; of split experts the
        numbers of the experts that tokens are sent to."""


class _Sum:
    """Σ x xᵀ, Σ x, Σ x̃ xᵀ and Σ x̃ over the tokens of a shard, and of all shards so far; see `distributed.shards`."""

    def __init__(self, width: int, device: torch.device, *, cross: bool) -> None:
        shapes = [(width, width), (width,)] * (2 if cross else 1)
        self._part = [torch.zeros(shape, device=device) for shape in shapes]
        self._total = [torch.zeros(shape, device=device) for shape in shapes]
        self._rows, self._all_rows = torch.zeros(2, 1, dtype=torch.int64)

    def add(self, inputs: Tensor, original: Tensor | None, weights: Tensor | None) -> None:
        weights = None if weights is None else weights.reshape(-1).to(inputs.device).float()
        rows = _rows_of(inputs)
        hessian, total, *unspoilt = self._part
        total += _sum_of(rows, weights)
        others = cross = None
        if unspoilt:
            cross, cross_total = unspoilt
            others = rows if original is None else _rows_of(original.to(inputs))
            cross_total += _sum_of(others, weights)
        add_products(rows, others, None if weights is None else weights.sqrt(), hessian, cross)
        self._rows += len(rows)

    def end_round(self, team: Team, shards: int) -> None:
        """Add the shards of the first so many processes of the team to all."""
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
        mean, *unspoilt = (each / counted for each in sums[1:])
        cross, cross_mean = unspoilt or (None, None)
        return Moments(hessian, mean, cross, cross_mean, rows)


def gather_moments(
    stream: BlockStream,
    groups: Sequence[tuple[str, ...]],
    original: Inputs | None = None,
    weights: Sequence[Tensor | None] | None = None,
    team: Team = ALONE,
) -> list[Moments]:
    """Run all batches and gather the moments of the input of each group of linears (see `shared_inputs`).

    The block is left as soon as the last of them has its input. With `original`, what the same linears read in the
    original model, the cross moments are gathered too. Each process of a team runs batches of its own, and all get all
    moments.

    weights: for each group `[samples, tokens]` or None, not negative and of mean 1: a token's x xᵀ counts by its weight
    (GuidedQuant, arXiv:2505.07004, section 3). Inputs that do not hold every token, see `is_whole` (experts read some
    of them), are not weighted.
    """
    names = [group[0] for group in groups]
    by_name = dict(zip(names, weights or (), strict=False))
    places = {name: place for name in names if (place := place_in_mixture(stream.block, name)) is not None}
    # Which tokens an expert reads is needed to compare them with those that it reads in the original.
    mixtures = [] if original is None else list(dict.fromkeys(mixture for mixture, _ in places.values()))
    sums = {
        name: _Sum(_width(stream.block.get_submodule(name)), stream.device, cross=original is not None)
        for name in names
    }
    for shards, batches in team.shards(len(stream.hidden)).rounds():
        for index in batches:
            seen = stream.inputs(index, [*mixtures, *names])
            reference = {} if original is None else original.inputs(index, [*mixtures, *names])
            for name, each in sums.items():
                if (inputs := seen.get(name)) is None:
                    continue
                unspoilt = _alike(inputs, reference.get(name), places.get(name), seen, reference)
                each.add(inputs, unspoilt, _weights_of(inputs, by_name.get(name), stream.span(index)))
        for each in sums.values():
            each.end_round(team, len(shards))
    return [each.mean(team) for each in sums.values()]


def _width(module: nn.Module) -> int:
    sizes = linear_sizes(module)
    assert sizes is not None, "moments are of what linears read"
    return sizes[1]


def _alike(
    inputs: Tensor,
    original: Tensor | None,
    place: tuple[str, int] | None,
    seen: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
) -> Tensor | None:
    """What a linear reads in the original, row for row of `inputs`; None where nothing is to be compared.

    place: of a linear of an expert, see `place_in_mixture`; `seen` and `reference` then have what its mixture is told.
    It may be sent other tokens than in the original: those say nothing about the difference.
    """
    if original is None:
        return None
    if place is None:
        return original if original.shape == inputs.shape else None
    mixture, expert = place
    now, then = (tokens_of(each[mixture].to(inputs.device), expert) for each in (seen, reference))
    found = inputs.clone()
    found[torch.isin(now, then)] = original.to(inputs)[torch.isin(then, now)]
    return found


def _rows_of(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1])


def _sum_of(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Over tokens, each of which counts by its weight."""
    return rows.sum(0, dtype=torch.float32) if weights is None else weights @ rows.float()


def _weights_of(inputs: Tensor, weights: Tensor | None, windows: slice) -> Tensor | None:
    if weights is None:
        return None
    rows = weights[windows]
    return rows if is_whole(inputs.shape[:-1], *rows.shape) else None
