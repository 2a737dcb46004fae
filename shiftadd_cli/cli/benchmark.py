"""`shiftadd benchmark`: measure the speed of a compressed model."""

from __future__ import annotations

import json
from typing import Any

import click

from shiftadd_cli.cli.options import a_model, dtype_option, remote_code_option, threads_option


class _Lengths(click.ParamType):
    """Converts `128,512` to a tuple of positive integers."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of positive integers, such as 128,512.", param, ctx)
        return tuple(map(int, parts))


@click.command()
@click.argument("model", metavar="OUT", shell_complete=a_model)
@click.option(
    "--against",
    metavar="ORIGINAL",
    shell_complete=a_model,
    help="Model to compare with; it is measured in its own data type and in float32.",
)
@click.option(
    "--prompt-tokens",
    type=_Lengths(),
    metavar="N,N,...",
    help="Prompt lengths, in tokens.  [default: 128,512, if the model's context allows]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    help="Tokens to generate after the shortest prompt.  [default: 64, or half of the context if that is less]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Batch size, in prompts or images.  [default: 1 prompt; 1 and 16 images]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How many times to measure everything, with the candidates taking turns.",
)
@threads_option
@dtype_option
@remote_code_option
@click.option(
    "--layers/--no-layers",
    default=True,
    show_default=True,
    help="Also measure each kind of compressed layer on its own, along with dense layers and memory bandwidth.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on standard output.")
def benchmark(
    model: str,
    against: str | None,
    prompt_tokens: tuple[int, ...] | None,
    new_tokens: int | None,
    batch: int | None,
    rounds: int,
    threads: int | None,
    dtype: str,
    trust_remote_code: bool,
    layers: bool,
    as_json: bool,
) -> None:
    """Measure how fast OUT runs on this machine's CPU and, with --against, the speedup over the original.

    OUT is a folder written by `shiftadd quantize`, or an original model. Language models are measured in prefill and
    decode, vision models in images per second. Models and layers take turns in every round, so that other load on the
    machine affects all of them alike; medians are shown. The weights of single layers are read from memory and not from
    the cache, as in a full model. --dtype applies to OUT.
    """
    from transformers.utils import logging

    from shiftadd_cli.benchmark import run
    from shiftadd_cli.cli.describe_benchmark import describe_benchmark

    logging.disable_progress_bar()
    result = run.benchmark(
        model,
        against=against,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        rounds=rounds,
        threads=threads,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        layers=layers,
    )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(describe_benchmark(result))
