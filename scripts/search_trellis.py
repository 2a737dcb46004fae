"""Searches masks for trellis codes, see `bcq.primitives.trellis.code`, on a unit Gaussian.

Draws random masks with few taps for a quarter of the time, and then changes one or two bits of the best masks. A code
is measured by encoding Gaussian numbers and fitting the scales of its planes by least squares, in turns. The best codes
are measured again on more numbers, endless and in stripes. Prints the mean squared error. Plain scalar levels have
0.3634, 0.1175, 0.0345 and 0.0095 at 1 to 4 bits, and no code gets below 4^-bits.

    python scripts/search_trellis.py --bits 2 --planes 3 --minutes 5
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import code_signs
from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode
from shiftadd_cli.bcq.primitives.trellis.paths import BestPaths
from shiftadd_cli.cli.summary import table
from shiftadd_cli.progress import progress

STRIPES = (256, 128, 64, 32, 16)
# Numbers of a first measurement, of the ranking of codes that pass it, and of the last one; rows of a usual stripe.
SHORT, MIDDLE, LONG = 3072, 24576, 131072
RANKED_STRIPE = 192
# Random codes have at most this many taps a plane.
MOST_TAPS = 4
# A tap counts as much as this share of the error, so that of two nearly equal codes the simpler one ranks first.
TAP_PRICE = 0.002


@dataclass(frozen=True)
class Result:
    """A code, its scales for a unit Gaussian `[m]`, and its mean squared error."""

    code: TrellisCode
    scales: tuple[float, ...]
    error: float

    @property
    def rank(self) -> float:
        """The error, raised by the price of the taps."""
        return self.error * (1 + TAP_PRICE * self.code.taps)


def measure(code: TrellisCode, goals: Tensor, rounds: int, scales: tuple[float, ...], stripe: int = 0) -> Result:
    """The error of a code on `goals` `[rows]` of unit Gaussian numbers.

    rounds: of encoding and fitting; scales: to begin with; stripe: rows of a path, 0 for one endless path.
    """
    planes, rows, stripe = code.planes, len(goals), stripe or len(goals)
    signs = code_signs(planes)
    fitted = torch.tensor(scales)
    form, group, error = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.inf
    for _ in range(rounds):
        levels = (fitted @ signs.T).expand(1, rows, -1).contiguous()
        values = torch.empty(1, rows)
        stored, _ = BestPaths(code, stripe, levels).settle(goals[None].clone(), form, group, values, descend=False)
        labels = code.selected(stored[0], stripe)
        counts = torch.bincount(labels, minlength=len(signs)).double()
        sums = torch.bincount(labels, weights=goals.double(), minlength=len(signs))
        basis = signs.double()
        gram = basis.T @ (counts.unsqueeze(1) * basis) + 1e-3 * torch.eye(planes)
        solution = torch.linalg.solve(gram, basis.T @ sums)
        decoded = basis @ solution
        squares = float(goals.double().square().sum())
        error = (squares - 2 * float(decoded @ sums) + float(counts @ decoded.square())) / rows
        fitted = solution.float()
    return Result(code, tuple(fitted.tolist()), error)


def random_scales(planes: int, source: random.Random) -> tuple[float, ...]:
    """Scales in a geometric series with a ratio from 1 to 2, so that the levels have the deviation 1 of the numbers."""
    ratio = source.uniform(1, 2)
    series = [ratio**plane for plane in range(planes)]
    size = sum(scale**2 for scale in series) ** 0.5
    return tuple(scale / size for scale in series)


def random_masks(bits: int, planes: int, memory: int, source: random.Random) -> tuple[int, ...]:
    """Masks with few taps, all different."""
    masks: list[int] = []
    while len(masks) < planes:
        taps = source.sample(range(memory + bits), source.randint(1, MOST_TAPS))
        mask = sum(1 << tap for tap in taps)
        if mask not in masks:
            masks.append(mask)
    return tuple(masks)


def changed_masks(masks: tuple[int, ...], width: int, source: random.Random) -> tuple[int, ...] | None:
    """The masks with one or two bits changed, or None if the result is no code."""
    changed = [*masks]
    for _ in range(source.randint(1, 2)):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(width)
    return tuple(changed) if all(changed) and len(set(changed)) == len(changed) else None


@click.command(help=__doc__)
@click.option("--bits", type=click.IntRange(1, 4), default=2, show_default=True, help="Stored bits per weight.")
@click.option("--planes", type=click.IntRange(2, 6), help="Computed planes.  [default: bits + 1]")
@click.option("--memory", type=click.IntRange(1, 10), default=6, show_default=True, help="Binary logarithm of states.")
@click.option("--minutes", type=click.FloatRange(min=0), default=5, show_default=True, help="Time to search.")
@click.option("--best", type=click.IntRange(min=1), default=12, show_default=True, help="Codes to measure again.")
@click.option("--start", help="Masks to begin with, hexadecimal, separated by commas.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(bits: int, planes: int | None, memory: int, minutes: float, best: int, start: str | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    source = random.Random(seed)
    planes = bits + 1 if planes is None else planes
    short, middle, long = (torch.randn(count, generator=generator) for count in (SHORT, MIDDLE, LONG))
    measured: set[tuple[int, ...]] = set()
    chosen: list[Result] = []

    def offer(masks: tuple[int, ...], scales: tuple[float, ...], rounds: int) -> None:
        if masks in measured:
            return
        code = TrellisCode(bits, memory, masks)
        result = measure(code, short, rounds, scales, RANKED_STRIPE)
        measured.add(masks)
        if len(chosen) < best or result.rank < 1.01 * chosen[-1].rank:
            chosen.append(measure(code, middle, 2, result.scales, RANKED_STRIPE))
            chosen.sort(key=lambda result: result.rank)
            del chosen[best:]

    if start:
        offer(tuple(int(mask, 16) for mask in start.split(",")), random_scales(planes, source), 8)
    steps = 200
    for step in progress(range(steps), steps, "Searching"):
        end = time.monotonic() + 60 * minutes / steps
        while time.monotonic() < end:
            if step < steps // 4 or not chosen:
                offer(random_masks(bits, planes, memory, source), random_scales(planes, source), 4)
                continue
            origin = source.choice(chosen)
            if (masks := changed_masks(origin.code.masks, memory + bits, source)) is not None:
                offer(masks, origin.scales, 2)
    rows = []
    again = [measure(result.code, long, 3, result.scales) for result in chosen]
    for result in sorted(again, key=lambda result: result.error):
        code, scales = result.code, result.scales
        cells = [" ".join(f"{mask:x}" for mask in code.masks), str(code.taps), f"{result.error:.4f}"]
        cells += [f"{measure(code, long, 1, scales, stripe).error:.4f}" for stripe in STRIPES]
        rows.append([*cells, " ".join(f"{scale:.3f}" for scale in scales)])
    click.echo(f"{len(measured)} codes measured")
    click.echo(table(["masks", "taps", "endless", *(f"rows {stripe}" for stripe in STRIPES), "scales"], rows))


if __name__ == "__main__":
    sys.exit(main())
