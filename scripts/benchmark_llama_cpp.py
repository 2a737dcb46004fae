"""Compares whole models with llama.cpp: tokens per second of decode and prefill, measured in alternation.

Our checkpoint runs in this process through transformers, as in `shiftadd benchmark`; the .gguf files run in llama.cpp's
own `llama-bench`. To build that outside the repository, from any copy of its sources:

    pip download --no-deps --no-binary :all: llama-cpp-python    # its vendor/llama.cpp is one such copy
    cmake -S .../llama.cpp -B /tmp/llama.cpp -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF
    cmake --build /tmp/llama.cpp --target llama-bench llama-quantize

    python scripts/benchmark_llama_cpp.py OUT --llama-bench /tmp/llama.cpp/bin/llama-bench \\
        --gguf model-q2_k.gguf --gguf model-q4_0.gguf

Neither side samples: llama-bench uses random tokens, ours takes the most likely token.
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
    """Tokens per second. writing: of decode; reading: of prefill."""

    writing: float
    reading: float


class Work(NamedTuple):
    """The work of one run. prompt: tokens of the prefill; new: tokens decoded after the first."""

    prompt: int
    new: int
    threads: int


def ours(model: Any, work: Work) -> Speeds:
    """Prefill a prompt and decode after it, through `generate` of transformers."""
    use_threads(work.threads)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (1, work.prompt), generator=generator)
    prefill, decode = time_generation(model, Clock(), tokens, work.new + 1)
    return Speeds(work.new / decode.wall, work.prompt / prefill.wall)


def llama_cpp(program: Path, gguf: Path, work: Work) -> Speeds:
    """The same by llama-bench. Raises ShiftaddError if it fails."""
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
    help="Path of llama.cpp's llama-bench.",
)
@click.option(
    "--gguf",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    required=True,
    help="Model for llama.cpp; may be repeated.",
)
@click.option("--dtype", default="bfloat16", show_default=True, help="Dtype that ours computes in.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Number of threads; may be repeated.",
)
@click.option("--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--new", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to decode.")
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
    """Compare the checkpoint MODEL with .gguf files in llama.cpp."""
    try:
        loaded = open_any(model).load(dtype, choose_device("cpu"))
        turns: dict[tuple[int, str], Callable[[], Speeds]] = {}
        for count in threads:
            work = Work(prompt, new, count)
            turns[count, loaded.info.spec] = partial(ours, loaded.model, work)
            turns |= {(count, gguf.name): partial(llama_cpp, program, gguf, work) for gguf in files}
        results = interleave(turns, rounds, desc="Measuring")
    except ShiftaddError as error:
        raise usage_error(error) from error
    bytes_of = {loaded.info.spec: loaded.info.file_bytes} | {gguf.name: gguf.stat().st_size for gguf in files}
    header = ("model", "size", "threads", "decode, tokens/s", "prefill, tokens/s", "ours over it, decode", "prefill")
    rows = []
    for (count, name), speeds in results.items():
        own = results[count, loaded.info.spec]
        decode, prefill = (Spread(tuple(speed[i] for speed in speeds)) for i in range(2))
        gains = [Spread(tuple(speed[i] for speed in own)).over(rate).median for i, rate in enumerate((decode, prefill))]
        rates = [f"{rate.median:.1f} ({rate.low:.1f} - {rate.high:.1f})" for rate in (decode, prefill)]
        rows.append((name, size(bytes_of[name]), str(count), *rates, *(f"{gain:.2f}" for gain in gains)))
    click.echo(table(header, rows))
    click.echo(f"Medians of {rounds} rounds (min - max); prompts of {prompt}, {new} new tokens; ours in {dtype}.")


if __name__ == "__main__":
    main()
