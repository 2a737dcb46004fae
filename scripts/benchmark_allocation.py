"""Compares mixes of bits at equal budgets, to show the gain of choosing bits layer by layer.

For every budget and calibration seed, it quantizes and measures the mix that each sensitivity chooses, a random mix
that fills the same budget, and the smallest equal bits that are not below the budget. It also replaces single layers to
see how well the sensitivities rank them. Finished parts are files in the work folder, so a killed run resumes where it
stopped. The results are `table.md` and `table.json` in that folder.

    python scripts/benchmark_allocation.py demo --budgets 2.25,2.5,3.0 --seeds 0,1,2 --max-tokens 20000 --work out/mixes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from experiments.mixes.bench import SENSITIVITIES, Allocations
from experiments.mixes.table import as_json, as_markdown
from experiments.quality.conditions import Conditions, name_tests
from experiments.quality.methods import parse_methods
from experiments.quality.options import POSITIVE, comparison_options, show_table

from shiftadd_cli.allocation.sensitivity import SensitivityKind
from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.errors import RecipeError, ShiftaddError
from shiftadd_cli.recipe import Recipe


class _Numbers(click.ParamType):
    """Numbers such as `2.25,3`, without duplicates."""

    name = "n,n,..."

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            numbers = [self.kind(part) for part in str(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(0 <= number < 2**32 for number in numbers):
            example = "0,1,2" if self.kind is int else "2.25,2.5,3"
            self.fail(f"{value!r} is not a list of numbers such as {example}.", param, ctx)
        return tuple(dict.fromkeys(numbers))


class _Kinds(click.ParamType):
    """Names of sensitivities such as `divergence,paper`."""

    name = "kind,kind,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[SensitivityKind, ...]:
        if isinstance(value, tuple):
            return value
        for name in (names := str(value).split(",")):
            if name not in SENSITIVITIES:
                self.fail(f"{name!r} is not one of {', '.join(SENSITIVITIES)}.", param, ctx)
        return tuple(kind for kind in SENSITIVITIES if kind in names)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--budgets", type=_Numbers(float), default="2.25,2.5,3", show_default=True, help="Stored bits per weight."
)
@click.option("--candidates", type=_Numbers(int), default="2,3,4", show_default=True, help="Bits a layer may get.")
@click.option("--recipe", default="equal-bits", show_default=True, help="Recipe of all mixes, with :field=value,... .")
@click.option("--seeds", type=_Numbers(int), default="0,1,2", show_default=True, help="Random seeds.")
@click.option(
    "--sample-blocks", type=POSITIVE, default=3, show_default=True, help="Blocks whose layers are replaced alone."
)
@click.option("--sample-bits", type=POSITIVE, default=2, show_default=True, help="Bits of these layers.")
@click.option("--once", type=_Kinds(), default=(), help="Sensitivities to measure only for the first seed.")
@comparison_options
def main(
    model: str,
    budgets: tuple[float, ...],
    candidates: tuple[int, ...],
    recipe: str,
    calibration: str,
    samples: int,
    seq_len: int,
    seeds: tuple[int, ...],
    tests: tuple[str, ...],
    context: int | None,
    max_tokens: int | None,
    dtype: str,
    sample_blocks: int,
    sample_bits: int,
    once: tuple[SensitivityKind, ...],
    work: Path,
    keep_artifacts: bool,
    together: int,
) -> None:
    """Compare ways to choose the bits of MODEL's layers (a hub id, a folder, a .gguf file or `demo`)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        methods = parse_methods([recipe])
        if len(methods) != 1:
            raise RecipeError("Give one recipe to --recipe, such as equal-bits:group_size=64.")
        conditions = [
            Conditions(model, calibration, samples, seq_len, seed, name_tests(tests), context, max_tokens, dtype)
            for seed in seeds
        ]
        # The option takes only whole numbers, so no candidate is the name of a shift.
        checked = Recipe.load("equal-bits", {"candidates": candidates}).candidates
        bench = Allocations(
            conditions,
            methods[0],
            budgets,
            tuple(bits for bits in checked if isinstance(bits, int)),
            sample_blocks,
            sample_bits,
            work,
            together,
            keep_artifacts,
            lambda line: click.echo(line, err=True),
            once,
        )
        show_table(bench, work, as_json, as_markdown)
    except ShiftaddError as error:
        raise usage_error(error) from error
    if bench.bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
