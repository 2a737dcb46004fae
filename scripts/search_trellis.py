"""Searches masks for trellis codes, see `bcq.primitives.trellis.code`, on a unit Gaussian.

Draws random masks, and then changes single bits of the best masks, as long as one improves. A code is measured by
encoding Gaussian numbers and fitting the scales of its planes by least squares, in turns. The best codes are measured
again on more numbers, endless and in stripes. Prints the mean squared error. Plain scalar levels have 0.3634, 0.1175,
0.0345 and 0.0095 at 1 to 4 bits, and no code gets below 4^-bits.

    python scripts/search_trellis.py --bits 2 --planes 3 --memory 6 --candidates 2000
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import code_signs
from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode
from shiftadd_cli.cli.summary import table
from shiftadd_cli.progress import progress

# Codes that are encoded together: enough that an operation outweighs its call, few enough for the cache.
BATCH = 32
STRIPES = (256, 128, 64, 32)


@dataclass(frozen=True)
class Result:
    """A code, its scales for a unit Gaussian `[m]`, and its mean squared error."""

    code: TrellisCode
    scales: tuple[float, ...]
    error: float


def encode_alike(codes: Sequence[TrellisCode], goals: Tensor, levels: Tensor) -> Tensor:
    """The selected levels, int64 `[codes, chains, rows]`, of codes of one size with the least squared error.

    goals: float32 `[chains, rows]`; levels: float32 `[codes, 2^m]`. Every chain starts in state 0.
    """
    first = codes[0]
    labels = torch.stack([code.labels for code in codes]).flatten(1).unsqueeze(1)
    predecessors, shape = first.predecessors, (len(codes), len(goals))
    cost = torch.full((*shape, first.states), torch.inf)
    cost[..., 0] = 0
    branches = []
    wide = labels.expand(*shape, -1)
    for goal in goals.T:
        errors = (goal.view(1, -1, 1) - levels.unsqueeze(1)) ** 2
        arriving = cost[..., predecessors] + errors.gather(-1, wide).view(*shape, *predecessors.shape)
        cost, branch = arriving.min(-2)
        cost -= cost.amin(-1, keepdim=True)
        branches.append(branch.to(torch.uint8))
    state = cost.argmin(-1, keepdim=True)
    selected = torch.empty(*shape, goals.shape[1], dtype=torch.int64)
    for row in reversed(range(goals.shape[1])):
        branch = branches[row].gather(-1, state).long()
        selected[..., row] = wide.gather(-1, branch * first.states + state).squeeze(-1)
        state = predecessors[branch, state]
    return selected


def measure(codes: Sequence[TrellisCode], goals: Tensor, rounds: int, scales: Tensor | None = None) -> list[Result]:
    """Results of codes of one size on `goals` `[chains, rows]` of unit Gaussian numbers.

    rounds: of encoding and fitting; scales: float32 `[codes, m]` to begin with.
    """
    planes = codes[0].planes
    signs = code_signs(planes).float()
    if scales is None:
        # Evenly spaced levels up to 2.2 standard deviations.
        scales = (2.2 / (2**planes - 1) * 2.0 ** torch.arange(planes)).expand(len(codes), -1)
    errors = torch.full((len(codes),), torch.inf)
    for _ in range(rounds):
        selected = encode_alike(codes, goals, scales @ signs.T)
        basis = signs[selected].flatten(1, 2)
        gram = basis.transpose(1, 2) @ basis
        target = basis.transpose(1, 2) @ goals.flatten().unsqueeze(-1)
        scales = torch.linalg.solve(gram + 1e-3 * torch.eye(planes), target).squeeze(-1)
        errors = (goals.flatten() - (basis @ scales.unsqueeze(-1)).squeeze(-1)).square().mean(-1)
    return [
        Result(code, tuple(fitted), float(error))
        for code, fitted, error in zip(codes, scales.tolist(), errors, strict=True)
    ]


def random_code(bits: int, planes: int, memory: int, generator: torch.Generator) -> TrellisCode:
    """A code whose planes mix the stored bits of all rows; a plane may be a stored bit alone."""
    top = 1 << (memory + bits)
    masks: list[int] = []
    while len(masks) < planes:
        mask = int(torch.randint(1, top, (1,), generator=generator))
        if mask not in masks:
            masks.append(mask)
    return TrellisCode(bits, memory, tuple(masks))


def neighbours(code: TrellisCode) -> list[TrellisCode]:
    """The codes that differ in a single bit of a single mask."""
    codes = []
    for plane, mask in enumerate(code.masks):
        for bit in range(code.memory + code.bits):
            masks = [*code.masks]
            masks[plane] = mask ^ 1 << bit
            if masks[plane] and len(set(masks)) == len(masks):
                codes.append(TrellisCode(code.bits, code.memory, tuple(masks)))
    return codes


def measure_all(codes: Sequence[TrellisCode], goals: Tensor, title: str) -> list[Result]:
    """`measure` in batches, best first."""
    results: list[Result] = []
    starts = range(0, len(codes), BATCH)
    for start in progress(starts, len(starts), title):
        results += measure(codes[start : start + BATCH], goals, rounds=5)
    return sorted(results, key=error_of)


def error_of(result: Result) -> float:
    """For sorting."""
    return result.error


@click.command(help=__doc__)
@click.option("--bits", type=click.IntRange(1, 4), default=2, show_default=True, help="Stored bits per weight.")
@click.option("--planes", type=click.IntRange(2, 6), help="Computed planes.  [default: bits + 1]")
@click.option("--memory", type=click.IntRange(1, 10), default=6, show_default=True, help="Binary logarithm of states.")
@click.option("--candidates", type=click.IntRange(min=1), default=2000, show_default=True, help="Codes to try.")
@click.option("--best", type=click.IntRange(min=1), default=8, show_default=True, help="Codes to measure again.")
@click.option(
    "--climbs", type=click.IntRange(min=0), default=4, show_default=True, help="Steps of changing single bits."
)
@click.option("--seed", type=int, default=0, show_default=True)
def main(bits: int, planes: int | None, memory: int, candidates: int, best: int, climbs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planes = bits + 1 if planes is None else planes
    codes = [random_code(bits, planes, memory, generator) for _ in range(candidates)]
    short, long = (torch.randn(chains, 1024, generator=generator) for chains in (1, 16))
    chosen = measure_all(codes, short, "Random codes")[:best]
    for step in range(1, climbs + 1):
        known = {result.code for result in chosen}
        near = [code for result in chosen for code in neighbours(result.code) if code not in known]
        improved = sorted([*chosen, *measure_all(near, short, f"Step {step}")], key=error_of)[:best]
        if improved == chosen:
            break
        chosen = improved
    scales = torch.tensor([result.scales for result in chosen])
    again = measure([result.code for result in chosen], long, 4, scales)
    rows = []
    for result in sorted(again, key=error_of):
        cells = [" ".join(f"{mask:x}" for mask in result.code.masks), str(result.code.taps), f"{result.error:.4f}"]
        start_scales = torch.tensor([result.scales])
        for stripe in STRIPES:
            cells.append(f"{measure([result.code], long.reshape(-1, stripe), 1, start_scales)[0].error:.4f}")
        rows.append([*cells, " ".join(f"{scale:.3f}" for scale in result.scales)])
    header = ["masks", "taps", "rows 1024", *(f"rows {stripe}" for stripe in STRIPES), "scales"]
    click.echo(table(header, rows))


if __name__ == "__main__":
    sys.exit(main())
