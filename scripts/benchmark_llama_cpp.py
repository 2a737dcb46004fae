"""Whole models beside llama.cpp: tokens per second of writing and of reading a prompt, taken in turns.

Our checkpoint runs in this process, as `shiftadd benchmark` measures it, through transformers; the .gguf files run in
llama.cpp's own `llama-bench`. To build that outside the repository, from any copy of its sources:

    pip download --no-deps --no-binary :all: llama-cpp-python    # its vendor/llama.cpp is one such copy
    cmake -S .../llama.cpp -B /tmp/llama.cpp -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF
    cmake --build /tmp/llama.cpp --target llama-bench llama-quantize

    python scripts/benchmark_llama_cpp.py OUT --llama-bench /tmp/llama.cpp/bin/llama-bench \\
        --gguf model-q2_k.gguf --gguf model-q4_0.gguf

Neither samples: llama-bench takes tokens at random, ours takes the likeliest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError, run
from typing import Any, NamedTuple

import click
import torch

from shiftadd_cli.benchmark.timing import Clock, Spread, interleave
from shiftadd_cli.benchmark.work import time_generation
from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.cli.summary import table
from shiftadd_cli.device import choose_device, use_threads
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.runtime.opened import open_any
from shiftadd_cli.sizes import size


class Speeds(NamedTuple):
    """Tokens per second."""

    writing: float
    reading: float


class Work(NamedTuple):
    """What one turn does. prompt, new: tokens read, and tokens written after the first."""

    prompt: int
    new: int
    threads: int


def ours(model: Any, work: Work) -> Speeds:
    """Read a prompt and write after it, through `generate` of transformers."""
    use_threads(work.threads)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (1, work.prompt), generator=generator)
    reading, writing = time_generation(model, Clock(), tokens, work.new + 1)
    return Speeds(work.new / writing.wall, work.prompt / reading.wall)


def llama_cpp(program: Path, gguf: Path, work: Work) -> Speeds:
    """The same by llama-bench. Raises ShiftaddError where it fails."""
    counts = ["-p", str(work.prompt), "-n", str(work.new), "-t", str(work.threads), "-r", "1"]
    try:
        done = run([program, "-m", gguf, "-o", "json", *counts], capture_output=True, text=True, check=True)
        rates = {entry["n_gen"] > 0: float(entry["avg_ts"]) for entry in json.loads(done.stdout)}
        return Speeds(rates[True], rates[False])
    except (OSError, CalledProcessError, ValueError, KeyError, TypeError) as error:
        raise ShiftaddError(f"{program} cannot run {gguf} ({error}); build llama-bench as this script says.") from error


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--llama-bench",
    "program",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="llama.cpp's program of that name.",
)
@click.option(
    "--gguf",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    help="Model for llama.cpp; may be repeated.",
)
@click.option("--dtype", default="bfloat16", show_default=True, help="What ours computes in.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Number of threads; may be repeated.",
)
@click.option("--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to read.")
@click.option("--new", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to write.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def main(
    model: str,
    program: Path,
    files: tuple[Path, ...],
    dtype: str,
    threads: tuple[int, ...],
    prompt: int,
    new: int,
    rounds: int,
) -> None:
    """Measure the checkpoint MODEL beside .gguf files in llama.cpp."""
    try:
        loaded = open_any(model).load(dtype, choose_device("cpu"))
        turns: dict[tuple[int, str], Callable[[], Speeds]] = {}
        for count in threads:
            work = Work(prompt, new, count)
            turns[count, loaded.info.spec] = partial(ours, loaded.model, work)
            turns |= {(count, gguf.name): partial(llama_cpp, program, gguf, work) for gguf in files}
        found = interleave(turns, rounds, desc="Measuring")
    except ShiftaddError as error:
        raise usage_error(error) from error
    bytes_of = {loaded.info.spec: loaded.info.file_bytes} | {each.name: each.stat().st_size for each in files}
    header = ("model", "size", "threads", "writing, tokens/s", "reading, tokens/s", "ours to it, writing", "reading")
    rows = []
    for (count, name), speeds in found.items():
        own = found[count, loaded.info.spec]
        writing, reading = (Spread(tuple(each[i] for each in speeds)) for i in range(2))
        gains = [Spread(tuple(each[i] for each in own)).over(rate).median for i, rate in enumerate((writing, reading))]
        rates = [f"{rate.median:.1f} ({rate.low:.1f} - {rate.high:.1f})" for rate in (writing, reading)]
        rows.append((name, size(bytes_of[name]), str(count), *rates, *(f"{gain:.2f}" for gain in gains)))
    click.echo(table(header, rows))
    click.echo(f"Medians of {rounds} rounds (least - most); prompts of {prompt}, {new} new tokens; ours in {dtype}.")


if __name__ == "__main__":
    main()
