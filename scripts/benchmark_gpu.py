"""Times the Triton kernels on a CUDA GPU against torch's dense product in half precision.

Every kernel's result is first compared with the product by the decoded matrix in float64; a wrong one ends the run.
Then the candidates alternate, round after round, and the median is printed. A round multiplies by several matrices in
a row, as the layers of a model would; together they are four times as large as the L2 cache. It runs from a CUDA graph,
which excludes the CPU's launch overhead. --eager includes it: the same calls are made one by one from Python.

    python scripts/benchmark_gpu.py --shape 4096x4096 --bits 3 --batch 1 --batch 16

The ratio is the dense product's time over the kernel's. GB/s counts the stored bytes of the matrix; `roof` is the
throughput, reads plus writes, of copying a gigabyte on the GPU, measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import click
import torch
from matrices import plane_format, random_matrix
from torch import Tensor
from torch.nn.functional import linear

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.cli.summary import table

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# The largest batch for which the GEMV is timed: its work grows with the batch.
GEMV_BATCH = 8
# Upper limit for the copies of a matrix, however small it is.
MOST_COPIES = 64

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One kernel on one problem; times in microseconds per product."""

    shape: str
    bits: int
    dtype: str
    batch: int
    kernel: str
    microseconds: float
    dense_microseconds: float
    stored_bytes: int

    @property
    def ratio(self) -> float:
        return self.dense_microseconds / self.microseconds

    @property
    def rate(self) -> float:
        """GB/s of stored bytes."""
        return self.stored_bytes / self.microseconds / 1e3


def relative_error(y: Tensor, x: Tensor, matrix: Tensor) -> float:
    """Error of `y` `[rows, out]` in the 2-norm, relative to `x` `[rows, in]` times the transposed float64 `matrix`."""
    exact = x.double() @ matrix.T
    return ((y.double() - exact).norm() / exact.norm()).item()


def allowed_error(dtype: torch.dtype) -> float:
    """One unit in the last place of half precision; a few for float32, because sums are kept in float32 too."""
    return 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps


def copies_beyond(cache_bytes: int, matrix_bytes: int) -> int:
    """Number of matrices that are four times as large as the cache together."""
    return min(MOST_COPIES, max(2, -(-4 * cache_bytes // matrix_bytes)))


def as_graph(calls: list[Call]) -> Callable[[], None]:
    """All calls in one CUDA graph. They have run before, so nothing is left to compile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def one_by_one(calls: list[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def interleaved(runs: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, float]:
    """Median microseconds per product by name. `runs`: a function and its number of products; the runs alternate."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, (run, products) in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            # The first rounds only raise the clock rates.
            if turn >= 3:
                taken[name].append(start.elapsed_time(end) * 1e3 / products)
    return {name: statistics.median(times) for name, times in taken.items()}


def memory_roof(device: torch.device) -> float:
    """GB/s, reads plus writes, of copying a gigabyte."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * source.nbytes / interleaved({"copy": (one_by_one([copy]), 1)}, 10)["copy"] / 1e3


def measure(
    layout: PackedLayout, dtype: torch.dtype, batches: tuple[int, ...], rounds: int, eager: bool, device: torch.device
) -> list[Row]:
    """Check and time the kernels for one layout of a matrix. Exits with 1 if a product is wrong."""
    from shiftadd_cli.kernels.triton_gemm import gemm
    from shiftadd_cli.kernels.triton_gemv import gemv
    from shiftadd_cli.kernels.triton_linear import prepare

    rows, columns = layout.grid.rows, layout.grid.columns
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    generator = torch.Generator(device).manual_seed(0)
    weights = [random_matrix(layout, generator) for _ in range(copies_beyond(cache, layout.nbytes))]
    prepared = [prepare(weight) for weight in weights]
    exact = weights[0].decode_stored().double()
    dense = [exact.to(dtype) for _ in range(copies_beyond(cache, rows * columns * dtype.itemsize))]
    measured = []
    for batch in batches:
        x = torch.randn(batch, columns, device=device, generator=generator).to(dtype)
        calls: dict[str, list[Call]] = {"dense": [partial(linear, x, matrix) for matrix in dense]}
        for kernel in (gemv, gemm):
            if kernel is gemv and batch > GEMV_BATCH:
                continue
            error = relative_error(kernel(x, prepared[0]), x, exact)
            if not error <= allowed_error(dtype):
                click.echo(f"{kernel.__name__} is wrong by {error:.2g} for {layout}, {dtype}, batch {batch}.", err=True)
                sys.exit(1)
            calls[kernel.__name__] = [partial(kernel, x, weight) for weight in prepared]
        arrange = one_by_one if eager else as_graph
        one_by_one([repeats[0] for repeats in calls.values()])()
        torch.cuda.synchronize()
        times = interleaved({name: (arrange(repeats), len(repeats)) for name, repeats in calls.items()}, rounds)
        measured += [
            Row(f"{rows}x{columns}", layout.bits, str(dtype)[6:], batch, name, time, times["dense"], layout.nbytes)
            for name, time in times.items()
            if name != "dense"
        ]
    return measured


def _shape(text: str) -> tuple[int, int]:
    rows, separator, columns = text.partition("x")
    if not (separator and rows.isdigit() and columns.isdigit() and int(rows) * int(columns)):
        raise click.BadParameter(f"{text!r} is not of the form 4096x11008.")
    return int(rows), int(columns)


@click.command()
@click.option(
    "--shape", "shapes", multiple=True, default=("4096x4096", "11008x4096", "4096x11008"), show_default=True,
    help="Outputs x inputs.",
)  # fmt: skip
@click.option("--bits", multiple=True, type=click.IntRange(1, 8), default=(2, 3, 4), show_default=True)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 2, 4, 8, 16, 64, 256),
              show_default=True)  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=("float16", "bfloat16"),
              show_default=True)  # fmt: skip
@click.option("--group-size", type=click.IntRange(8), default=128, show_default=True, help="A multiple of 8.")
@click.option("--scale-format", type=click.Choice(["pot", "apot2", "apot3", "float"]), default="pot", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True)
@click.option("--eager", is_flag=True, help="Launch from Python instead of a CUDA graph.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def main(
    shapes: tuple[str, ...],
    bits: tuple[int, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    group_size: int,
    scale_format: str,
    rounds: int,
    eager: bool,
    as_json: bool,
) -> None:
    """Check the GPU kernels and time them against torch's dense product. Without a CUDA GPU the exit code is 2."""
    sizes = [_shape(text) for text in shapes]
    if group_size % 8:
        raise click.BadParameter("--group-size must be a multiple of 8.")
    if not torch.cuda.is_available():
        click.echo("This benchmark needs a CUDA GPU, and torch sees none here.", err=True)
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    roof = memory_roof(device)
    measured = []
    for rows, columns in sizes:
        for name in dtypes:
            for count in bits:
                layout = PackedLayout(plane_format(count, group_size, scale_format), rows, columns)
                measured += measure(layout, DTYPES[name], batches, rounds, eager, device)
    if as_json:
        about = {"device": torch.cuda.get_device_name(device), "roof": roof, "eager": eager, "torch": torch.__version__}
        lines = [asdict(row) | {"ratio": row.ratio, "rate": row.rate} for row in measured]
        click.echo(json.dumps(about | {"rows": lines}, indent=2))
        return
    click.echo(f"{torch.cuda.get_device_name(device)}, roof {roof:.0f} GB/s, torch {torch.__version__}\n")
    click.echo(
        table(("shape", "dtype", "bits", "batch", "kernel", "ratio", "us", "dense us", "GB/s"), _cells(measured))
    )


def _cells(rows: list[Row]) -> list[tuple[str, ...]]:
    return [
        (
            row.shape,
            row.dtype,
            str(row.bits),
            str(row.batch),
            row.kernel,
            f"{row.ratio:.2f}",
            f"{row.microseconds:.1f}",
            f"{row.dense_microseconds:.1f}",
            f"{row.rate:.0f}",
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
