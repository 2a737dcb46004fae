"""`shiftadd allocate-bits`: the right number of bits for every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shiftadd_cli.cli.options import overrides_from, recipe_choice, recipe_options_without


@click.command("allocate-bits")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "out",
    metavar="PLAN",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write, for `shiftadd quantize --bit-plan`.",
)
@click.option(
    "--avg-bits",
    type=float,
    help="Stored bits per weight of the quantized layers, planes, scales and everything counted, not to be passed.",
)
@click.option("--target-size", metavar="SIZE", help="Size of all weight files not to be passed, such as 70MB.")
@click.option(
    "--max-divergence",
    metavar="NATS",
    type=float,
    help="Predicted loss, in nats a token, not to be passed: gives the smallest plan. Predicted, not measured.",
)
@click.option("--candidates", metavar="N,N,...", default="2,3,4", show_default=True, help="Bits a layer may get.")
@click.option(
    "--sensitivity",
    type=click.Choice(("output", "divergence", "paper")),
    default="output",
    show_default=True,
    help="How to tell what bits matter to a layer: 'output' takes its real error and the curvature of the model's "
    "loss; 'divergence' replaces each layer alone and runs the model, which takes far longer; 'paper' takes the "
    "criterion of ShiftAddLLM.",
)
@click.option("--keep", metavar="PATTERN=BITS", multiple=True, help="Layers that get these bits; may be repeated.")
@click.option(
    "--tie",
    metavar="PATTERN,PATTERN",
    multiple=True,
    help="Layers that get equal bits inside each block; may be repeated.",
)
@click.option(
    "--tie-fused/--no-tie-fused",
    default=True,
    help="Equal bits for layers that inference engines fuse (query, key, value; gate, up).  [default: on]",
)
@click.option(
    "--curve",
    metavar="FIRST:LAST:STEP",
    help="Show the loss predicted at these average bits as well, such as 2.25:4:0.25.",
)
@click.option("--overwrite", is_flag=True, help="Replace PLAN if it exists.")
@recipe_choice
@recipe_options_without("bits", "avg_bits", "bit_plan", "shard_size")
def allocate_bits(
    model: str,
    out: Path,
    avg_bits: float | None,
    target_size: str | None,
    max_divergence: float | None,
    candidates: str,
    sensitivity: Any,
    keep: tuple[str, ...],
    tie: tuple[str, ...],
    tie_fused: bool,
    curve: str | None,
    overwrite: bool,
    recipe: str,
    **fields: Any,
) -> None:
    """Choose the bits of every layer of MODEL under a budget and write them to a plan.

    Measures on calibration text how much the bits of every layer matter, and remembers it in $SHIFTADD_CACHE (by
    default ~/.cache/shiftadd), so that another budget costs seconds. The choice is optimal for what was measured. Give
    the recipe and its options as for `shiftadd quantize`.
    """
    import time

    from shiftadd_cli.recipe import Recipe

    settings = Recipe.load(recipe, overrides_from(fields))
    from shiftadd_cli.allocation.budget import Budget, parse_curve
    from shiftadd_cli.allocation.patterns import parse_candidates
    from shiftadd_cli.pipeline.allocate import AllocationJob, Request
    from shiftadd_cli.pipeline.describe_bits import describe_bit_plan, describe_front
    from shiftadd_cli.pipeline.plan import resident_bytes
    from shiftadd_cli.pipeline.plan_output import check_plan_output, write_plan
    from shiftadd_cli.progress import block_bar
    from shiftadd_cli.report.summary import size
    from shiftadd_cli.source import open_source

    start = time.monotonic()
    budget = Budget.parse(avg_bits, target_size, max_divergence)
    request = Request(budget, parse_candidates(candidates), sensitivity, keep, tie, tie_fused)
    points = [] if curve is None else parse_curve(curve)
    check_plan_output(out, overwrite=overwrite)
    job = AllocationJob.prepare(open_source(model, dtype=settings.dtype), settings, request)
    others = [job.with_budget(point) for point in points]
    plan = job.run(block_bar)
    write_plan(plan, out)
    click.echo(describe_bit_plan(plan, [each.spec for each in job.linears]))
    if others:
        # What the first one measured is remembered.
        click.echo("\n" + describe_front([other.run(block_bar) for other in others]) + "\n")
    click.echo(f"Time          {time.monotonic() - start:.0f} s")
    click.echo(f"Peak memory   {size(resident_bytes())}")
    click.echo(f"Written to    {out}")
