"""Times the CPU kernels on single layers against torch's dense product in float32 and bfloat16.

The candidates alternate, round after round. Each uses several copies of its matrix, as the layers of a model would;
together they are twice as large as the last-level cache. The medians of wall time and processor time are printed.
`roof` is the highest throughput of memory reads in the same run, with as many threads.

    python scripts/benchmark_kernels.py --shape 4096x4096 --bits 2,3,4 --batch 1,16 --threads 1,2

`exact` and `fast` are float32 activations with 32-bit and 16-bit tables, `bfloat16` is the path of a model in that
dtype. With `--ggml`, the library that scripts/ggml builds, llama.cpp's products are timed too, on its weight format
with about as many bits, both as stored in its files and, if there is one, in its repacked layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import torch
from ggml_layers import FORMATS, GgmlLayers, GgmlLibrary
from matrices import plane_format, random_matrix
from torch import Tensor
from torch.nn.functional import linear

from shiftadd_cli.bcq.choices import Choice, parse_choice
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.benchmark.layer_speed import SAMPLE_SECONDS, Ring, copies_for
from shiftadd_cli.benchmark.machine import ASSUMED_CACHE_BYTES, Machine, free_memory
from shiftadd_cli.benchmark.roof import Roof, read_roof, roof_bytes
from shiftadd_cli.benchmark.timing import Clock, Span, Timed, interleave
from shiftadd_cli.cli.summary import table
from shiftadd_cli.kernels import ops
from shiftadd_cli.kernels.cpu_weight import CpuWeight
from shiftadd_cli.native.extension import instruction_sets
from shiftadd_cli.progress import progress

# The last ones are layers of SmolLM2-135M.
SHAPES = ("4096x4096", "11008x4096", "768x768", "576x576", "1536x576", "576x1536")
OURS = {"exact": (torch.float32, False), "fast": (torch.float32, True), "bfloat16": (torch.bfloat16, True)}
DENSE = {"torch float32": torch.float32, "torch bfloat16": torch.bfloat16}
MOST_BYTES = 2 << 30


class Numbers(click.ParamType):
    """Whole numbers such as `1,4,16`."""

    name = "n,n,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of whole numbers such as 1,4,16.", param, ctx)
        return tuple(int(part) for part in parts)


class Layers(click.ParamType):
    """Ways to store a layer such as `2,trellis1-2`, see `bcq.choices`."""

    name = "choice,choice,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Choice, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(parse_choice(part) for part in str(value).split(","))
        except ValueError as failure:
            self.fail(str(failure), param, ctx)


@dataclass(frozen=True)
class Row:
    """All candidates on one problem; seconds are medians of one call."""

    shape: str
    bits: Choice
    batch: int
    threads: int
    bits_per_weight: float
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    weight_bytes: dict[str, int]
    roof: float

    def ratio(self, other: str, ours: str) -> float:
        return self.seconds[other] / self.seconds[ours]

    @property
    def ggml(self) -> str | None:
        """The faster of llama.cpp's candidates."""
        return min(
            (name for name in self.seconds if name.startswith("ggml ")), key=self.seconds.__getitem__, default=None
        )

    def microseconds(self, name: str) -> str:
        return f"{1e6 * self.seconds[name]:.0f} ({1e6 * self.cpu_seconds[name]:.0f})"

    def roof_share(self, name: str) -> float:
        return self.weight_bytes[name] / self.seconds[name] / self.roof


def packed_call(weight: QuantizedWeight, fast: bool, kernels: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """A call of the compressed layer, and the bytes of the weight that it reads."""
    packed, layout = CpuWeight.pack(weight), weight.layout
    size = sum(tensor.nbytes for tensor in packed.tensors().values() if tensor is not None)
    call = partial(
        ops.lookup_linear,
        words=packed.words,
        scale_codes=packed.scale_codes,
        scales=packed.scales,
        offsets=packed.offsets,
        row_scale=packed.row_scale,
        bias=None,
        signs=packed.signs,
        group_columns=layout.grid.group_columns,
        bits=layout.bits,
        planes=layout.planes,
        fast=fast,
        kernels=kernels,
    )
    return call, size


def rings_of(layout: PackedLayout, cache_bytes: int, kernels: str) -> dict[str, Ring]:
    """The candidates, each with enough copies."""
    generator = torch.Generator().manual_seed(0)
    weight = random_matrix(layout, generator)
    rings = {}
    for name, (dtype, fast) in OURS.items():
        first, size = packed_call(weight, fast, kernels)
        count = copies_for(size, cache_bytes, MOST_BYTES)
        calls = [first, *(packed_call(weight, fast, kernels)[0] for _ in range(count - 1))]
        rings[name] = Ring(calls, size, cold=count * size > cache_bytes, dtype=dtype)
    decoded = weight.decode_stored()
    for name, dtype in DENSE.items():
        dense = decoded.to(dtype)
        count = copies_for(dense.nbytes, cache_bytes, MOST_BYTES)
        layers: list[Callable[[Tensor], Tensor]] = [partial(linear, weight=dense.clone()) for _ in range(count)]
        rings[name] = Ring(layers, dense.nbytes, cold=count * dense.nbytes > cache_bytes, dtype=dtype)
    return rings


def ggml_layers(
    library: GgmlLibrary, layout: PackedLayout, x: Tensor, threads: int, cache_bytes: int
) -> Iterator[tuple[str, GgmlLayers]]:
    """llama.cpp's candidates for a layout; none if it has no format for these bits or columns."""
    kind = FORMATS.get(layout.bits)
    if kind is None:
        return
    weight = torch.randn(layout.grid.rows, layout.grid.columns, generator=torch.Generator().manual_seed(0))
    copies = copies_for(layout.nbytes, cache_bytes, MOST_BYTES)
    for name, repack in ((f"ggml {kind}", False), (f"ggml {kind} repacked", True)):
        try:
            yield name, GgmlLayers(library, kind, weight, x, copies=copies, threads=threads, repack=repack)
        except ValueError:
            continue


def ggml_sample(layers: GgmlLayers, clock: Clock) -> Callable[[], Span]:
    """Return a function that times one product, as the mean over the products of a sample."""
    layers.run()
    passes = max(1, math.ceil(SAMPLE_SECONDS / max(clock.time(layers.run).wall, 1e-9)))

    def sample() -> Span:
        start = clock.now()
        for _ in range(passes):
            layers.run()
        return (clock.now() - start) / (passes * layers.copies)

    return sample


def measure(
    rings: dict[str, Ring],
    layout: PackedLayout,
    batch: int,
    threads: int,
    rounds: int,
    roof: Roof,
    ggml: GgmlLibrary | None = None,
    cache_bytes: int = ASSUMED_CACHE_BYTES,
) -> Row:
    """Time all candidates on one problem, in alternation."""
    torch.set_num_threads(threads)
    clock = Clock()
    x = torch.randn(batch, layout.grid.columns, generator=torch.Generator().manual_seed(batch))
    samples: dict[str, Callable[[], Span]] = {}
    weight_bytes = {name: ring.nbytes for name, ring in rings.items()}
    for name, ring in rings.items():
        activations = x.to(ring.dtype)
        samples[name] = partial(ring.sample, activations, ring.calls_for(activations, clock), clock)
    with ExitStack() as stack:
        if ggml is not None:
            for name, layers in ggml_layers(ggml, layout, x, threads, cache_bytes):
                samples[name] = ggml_sample(stack.enter_context(layers), clock)
                weight_bytes[name] = layers.nbytes
        timed = {name: Timed(tuple(spans)) for name, spans in interleave(samples, rounds).items()}
    return Row(
        shape=f"{layout.grid.rows}x{layout.grid.columns}",
        bits=layout.format.choice,
        batch=batch,
        threads=threads,
        bits_per_weight=layout.bits_per_weight,
        seconds={name: timing.seconds.median for name, timing in timed.items()},
        cpu_seconds={name: timing.seconds.median * timing.cores.median for name, timing in timed.items()},
        weight_bytes=weight_bytes,
        roof=roof.bytes_per_second,
    )


def as_text(rows: list[Row]) -> str:
    """The table, ratios first: the speedup of our layers over dense ones."""
    header = ["shape", "bits", "stored", "batch", "threads", "exact/fp32", "fast/fp32", "bf16/fp32", "bf16/bf16"]
    header += ["exact", "fast", "bf16", "fp32", "bf16 dense", "roof exact", "fast"]
    compared = any(row.ggml for row in rows)
    header += ["exact/ggml", "fast/ggml", "ggml", "faster format", "stored"] * compared
    lines = []
    for row in rows:
        cells = [row.shape, str(row.bits), f"{row.bits_per_weight:.2f}", str(row.batch), str(row.threads)]
        cells += [f"{row.ratio('torch float32', name):.2f}" for name in OURS]
        cells.append(f"{row.ratio('torch bfloat16', 'bfloat16'):.2f}")
        cells += [row.microseconds(name) for name in (*OURS, *DENSE)]
        cells += [f"{row.roof_share(name):.0%}" if row.batch == 1 else "-" for name in ("exact", "fast")]
        cells += ggml_cells(row) * compared
        lines.append(cells)
    return table(header, lines)


def ggml_cells(row: Row) -> list[str]:
    """The faster of llama.cpp's candidates compared with ours."""
    name = row.ggml
    if name is None:
        return ["-"] * 5
    height, width = (int(part) for part in row.shape.split("x"))
    ratios = [f"{row.ratio(name, ours):.2f}" for ours in ("exact", "fast")]
    stored = 8 * row.weight_bytes[name] / (height * width)
    return [*ratios, row.microseconds(name), name.removeprefix("ggml "), f"{stored:.2f}"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="Rows x columns; repeatable.")
@click.option("--bits", "choices", type=Layers(), default="2,3,4", show_default=True)
@click.option("--batch", type=Numbers(), default="1,4,16,64,256", show_default=True, help="Rows of activations.")
@click.option("--threads", type=Numbers(), default="1,2", show_default=True)
@click.option("--group-size", default=128, show_default=True, help="Columns that share a scale set.")
@click.option("--scale-format", type=click.Choice(["pot", "apot2", "apot3", "float"]), default="apot2")
@click.option(
    "--kernels", default="", help=f"Instruction set, one of {', '.join(instruction_sets())}; the best by default."
)
@click.option(
    "--ggml",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Library built from scripts/ggml, to compare with llama.cpp.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def main(
    shapes: tuple[str, ...],
    choices: tuple[Choice, ...],
    batch: tuple[int, ...],
    threads: tuple[int, ...],
    group_size: int,
    scale_format: str,
    kernels: str,
    ggml: Path | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Compare the kernels with torch on this machine."""
    if not instruction_sets():
        raise click.UsageError("This installation has no compiled kernels; install a C++ compiler and reinstall it.")
    if kernels and kernels not in instruction_sets():
        raise click.UsageError(f"This machine runs {', '.join(instruction_sets())}, not {kernels!r}.")
    library = None
    if ggml is not None:
        try:
            library = GgmlLibrary(ggml)
        except OSError as failure:
            raise click.UsageError(f"--ggml: {failure}; build it as scripts/ggml/CMakeLists.txt says.") from failure
    machine = Machine.this(max(threads))
    cache = machine.cache_bytes or ASSUMED_CACHE_BYTES
    roofs = {}
    for count in threads:
        torch.set_num_threads(count)
        roofs[count] = read_roof(roof_bytes(cache, free_memory()))
    rows = []
    problems = [(shape, choice) for shape in shapes for choice in choices]
    for shape, choice in progress(problems, total=len(problems), desc="Layers"):
        height, width = (int(part) for part in shape.split("x"))
        layout = PackedLayout(plane_format(choice, group_size, scale_format), height, width)
        rings = rings_of(layout, cache, kernels)
        rows += [
            measure(rings, layout, size, count, rounds, roofs[count], library, cache)
            for count in threads
            for size in batch
        ]
    if as_json:
        roof_bytes_read = {count: roof.to_dict() for count, roof in roofs.items()}
        document = {"machine": machine.to_dict(), "roofs": roof_bytes_read, "rows": [asdict(row) for row in rows]}
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(as_text(rows))
    throughputs = ", ".join(f"{roof.bytes_per_second / 1e9:.1f} GB/s with {count}" for count, roof in roofs.items())
    click.echo(f"\n{machine.cpu}; kernels {kernels or instruction_sets()[0]}; memory read at {throughputs} threads.")
    click.echo("Times are medians in microseconds, processor time in brackets. A ratio above 1: ours is faster.")


if __name__ == "__main__":
    main()
