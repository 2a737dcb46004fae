"""`shiftadd allocate-bits`: the right number of bits for every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shiftadd_cli.cli.options import (
    a_model,
    overrides_from,
    recipe_choice,
    recipe_options_without,
    remote_code_option,
    team_timeout_option,
)


@click.command("allocate-bits")
@click.argument("model", shell_complete=a_model)
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
    help="Predicted loss, in nats a token (or an image), not to be passed: gives the smallest plan. Predicted, not "
    "measured.",
)
@click.option(
    "--cost",
    type=click.Choice(("bits", "latency", "energy")),
    default="bits",
    show_default=True,
    help="What the budget is of: stored bits, or what a table of yours says layers cost.",
)
@click.option(
    "--cost-table",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What layers cost at each number of bits, for --cost latency or energy; docs/bits.md says its form.",
)
@click.option("--max-cost", type=float, help="Cost of all quantized layers not to be passed, in the table's unit.")
@click.option(
    "--sensitivity",
    type=click.Choice(("output", "divergence", "paper")),
    default="output",
    show_default=True,
    help="How to tell what bits matter to a layer: 'output' takes its real error and the curvature of the model's "
    "loss, and measures a few layers of each kind; 'divergence' measures all, by replacing each alone and running the "
    "model, which takes far longer; 'paper' takes the criterion of ShiftAddLLM.",
)
@click.option(
    "--keep",
    metavar="PATTERN=BITS",
    multiple=True,
    help="Layers that get these bits, or shift1 or shift2; may be repeated.",
)
@click.option(
    "--tie",
    metavar="PATTERN,PATTERN",
    multiple=True,
    help="Layers that get equal bits inside each block; may be repeated.",
)
@click.option(
    "--curve",
    metavar="FIRST:LAST:STEP",
    help="Show the loss predicted at these average bits as well, such as 2.25:4:0.25.",
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw the plan, and the loss predicted at every size, as .svg, .png or .pdf; needs matplotlib.",
)
@click.option("--overwrite", is_flag=True, help="Replace PLAN and the picture if they exist.")
@remote_code_option
@team_timeout_option
@recipe_choice
@recipe_options_without("primitive", "bits", "avg_bits", "bit_plan", "shard_size")
def allocate_bits(
    model: str,
    out: Path,
    avg_bits: float | None,
    target_size: str | None,
    max_divergence: float | None,
    cost: Any,
    cost_table: Path | None,
    max_cost: float | None,
    sensitivity: Any,
    keep: tuple[str, ...],
    tie: tuple[str, ...],
    curve: str | None,
    plot: Path | None,
    overwrite: bool,
    trust_remote_code: bool,
    team_timeout: float,
    recipe: str,
    **fields: Any,
) -> None:
    """Choose the bits of every layer of MODEL under a budget and write them to a plan.

    Measures on calibration data how much the bits of every layer matter, and remembers it in $SHIFTADD_CACHE (by
    default ~/.cache/shiftadd), so that another budget costs seconds. The choice is optimal for what was measured. Give
    the recipe and its options as for `shiftadd quantize`. Several processes share the measuring where torchrun starts
    them.
    """
    import time

    from shiftadd_cli.recipe import Recipe

    settings = Recipe.load(recipe, overrides_from(fields))
    from shiftadd_cli.allocation.budget import parse_curve
    from shiftadd_cli.allocation.cost_table import CostLimit, parse_budget
    from shiftadd_cli.cli.describe_bits import describe_bit_plan, describe_front
    from shiftadd_cli.cli.plan_output import check_plan_output, write_plan
    from shiftadd_cli.cli.plot_bits import check_plot_output, draw_bit_plan
    from shiftadd_cli.distributed.launch import join_team
    from shiftadd_cli.pipeline.allocate import AllocationJob, Request
    from shiftadd_cli.pipeline.memory import resident_bytes
    from shiftadd_cli.progress import block_bar, silent
    from shiftadd_cli.sizes import size
    from shiftadd_cli.source import open_source
    from shiftadd_cli.storage.refusals import write_file

    start = time.monotonic()
    budget = parse_budget(avg_bits, target_size, max_divergence, cost, cost_table, max_cost)
    request = Request(budget, settings.candidates, sensitivity, keep, tie, settings.tie_fused)
    points = [] if curve is None else parse_curve(curve)
    with join_team(team_timeout) as team:
        if team.first:
            check_plan_output(out, overwrite=overwrite)
            if plot is not None:
                check_plot_output(plot, out, overwrite=overwrite)
        source = open_source(model, dtype=settings.dtype, trust_remote_code=trust_remote_code)
        job = AllocationJob.prepare(source, settings, request)
        others = [job.with_budget(point) for point in points]
        sensitivities = job.sensitivities(block_bar if team.first else silent, team)
    if not team.first:
        return
    plan = job.choose(sensitivities)
    write_plan(plan, out)
    linears = [each.spec for each in job.linears]
    click.echo(describe_bit_plan(plan, linears))
    if isinstance(budget, CostLimit):
        click.echo(
            f"{budget.table.cost.capitalize():<13} {budget.spent(plan.bits, job.shapes):.6g} {budget.table.unit}"
        )
    if others:
        click.echo("\n" + describe_front([other.choose(sensitivities) for other in others]) + "\n")
    if plot is not None:
        write_file(plot, draw_bit_plan(plan, linears, job.front(sensitivities), plot.suffix))
        click.echo(f"Picture       {plot}")
    click.echo(f"Time          {time.monotonic() - start:.0f} s")
    click.echo(f"Peak memory   {size(resident_bytes())}")
    click.echo(f"Written to    {out}")
