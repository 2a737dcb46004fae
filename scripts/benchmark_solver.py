"""Times the compiled kernels of `quantize` against torch: second moments of activations, and the column-by-column steps
of the solver.

The candidates alternate, round after round. The table has medians of milliseconds, and the speedup of the kernels over
torch.

    python scripts/benchmark_solver.py --columns 576,1536,4096 --threads 1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import torch
from benchmark_kernels import Numbers

from shiftadd_cli.bcq.levels import LevelTable
from shiftadd_cli.benchmark.timing import Clock, Timed, interleave
from shiftadd_cli.calibration.products import add_products
from shiftadd_cli.cli.summary import table
from shiftadd_cli.native.extension import instruction_sets

# The columns that a sweep updates at once, and the rows of one piece of the solver's work.
BLOCK, ROWS = 128, 512


def moments(columns: int, tokens: int, dtype: torch.dtype) -> Callable[[str], object]:
    """Both moments of one batch of inputs, as asymmetric calibration accumulates them."""
    g = torch.Generator().manual_seed(0)
    x, other = (torch.randn(tokens, columns, generator=g).to(dtype) for _ in range(2))
    hessian, cross = torch.zeros(2, columns, columns)
    return lambda way: add_products(x, other, None, hessian, cross, way)


def descent(columns: int) -> Callable[[str], object]:
    """One pass over `columns` columns of 3 bits in groups of 128."""
    g = torch.Generator().manual_seed(0)
    tables = LevelTable.build(torch.rand(-(-columns // 128), ROWS, 3, generator=g), None)
    groups = torch.arange(columns) // 128
    goals, values = torch.randn(2, columns, ROWS, generator=g)
    form = torch.randn(BLOCK, BLOCK, generator=g) / BLOCK + torch.eye(BLOCK)

    def run(way: str) -> None:
        for start in range(0, columns, BLOCK):
            block = slice(start, min(start + BLOCK, columns))
            count = block.stop - block.start
            tables.settle(
                goals[block].clone(),
                form[:count, :count],
                groups[block],
                values[block],
                descend=True,
                kernels=way,
            )

    return run


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--columns", "widths", type=Numbers(), default="576,1536,4096", show_default=True)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens in a batch of activations."
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
def main(widths: tuple[int, ...], tokens: int, threads: int, rounds: int) -> None:
    """Compare the compiled kernels of this machine with torch."""
    torch.set_num_threads(threads)
    ways, clock, lines = ["torch", *instruction_sets()], Clock(), []
    for columns in widths:
        works = {
            "moments, bfloat16": moments(columns, tokens, torch.bfloat16),
            "moments, float32": moments(columns, tokens, torch.float32),
            "descent, 512 rows": descent(columns),
        }
        for name, work in works.items():
            samples = interleave({way: partial(clock.time, partial(work, way)) for way in ways}, rounds)
            seconds = {way: Timed(tuple(spans)).seconds.median for way, spans in samples.items()}
            cells = [f"{1e3 * seconds[way]:.1f} ({seconds['torch'] / seconds[way]:.1f} x)" for way in ways]
            lines.append([name, str(columns), *cells])
    click.echo(table(("work", "columns", *(f"{way}, ms" for way in ways)), lines))


if __name__ == "__main__":
    main()
