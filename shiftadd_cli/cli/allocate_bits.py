"""`shiftadd allocate-bits`: choose the number of bits for every layer."""

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
    help="Plan file to write, for `shiftadd quantize --bit-plan`.",
)
@click.option(
    "--avg-bits",
    type=float,
    help="Upper limit on the stored bits per weight of the quantized layers, with planes, scales and all overhead.",
)
@click.option(
    "--avg-file-bits",
    type=float,
    help="Upper limit on the bits of all weight files, divided by the number of parameters.",
)
@click.option("--target-size", metavar="SIZE", help="Upper limit on the size of all weight files, such as 70MB.")
@click.option(
    "--max-divergence",
    metavar="NATS",
    type=float,
    help="Upper limit on the loss, in nats per token (or image): gives the smallest plan within it. The loss is "
    "predicted, not measured.",
)
@click.option(
    "--cost",
    type=click.Choice(("bits", "latency", "energy")),
    default="bits",
    show_default=True,
    help="Quantity that the budget limits: stored bits, or the cost of the layers from a table of yours.",
)
@click.option(
    "--cost-table",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File with the cost of each layer at each number of bits, for --cost latency or energy; see docs/bits.md.",
)
@click.option("--max-cost", type=float, help="Upper limit on the cost of all quantized layers, in the table's unit.")
@click.option(
    "--sensitivity",
    type=click.Choice(("output", "divergence", "paper")),
    default="output",
    show_default=True,
    help="How to estimate each layer's sensitivity to its bits: 'output' uses the layer's actual error and the "
    "curvature of the model's loss, and measures a few layers of each kind; 'divergence' measures every layer by "
    "replacing it alone and running the model, which takes far longer; 'paper' uses the criterion of ShiftAddLLM.",
)
@click.option(
    "--keep",
    metavar="PATTERN=BITS",
    multiple=True,
    help="Fix the bits of matching layers: a number, shift1 or shift2; may be repeated.",
)
@click.option(
    "--tie",
    metavar="PATTERN,PATTERN",
    multiple=True,
    help="Give matching layers of a block equal bits; may be repeated.",
)
@click.option(
    "--curve",
    metavar="FIRST:LAST:STEP",
    help="Also show the predicted loss at these average bits, such as 2.25:4:0.25.",
)
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Plot the plan, and the predicted loss at every size, as .svg, .png or .pdf; needs matplotlib.",
)
@click.option("--overwrite", is_flag=True, help="Replace PLAN and the plot if they exist.")
@remote_code_option
@team_timeout_option
@recipe_choice
@recipe_options_without("primitive", "bits", "avg_bits", "avg_file_bits", "target_size", "bit_plan", "shard_size")
def allocate_bits(
    model: str,
    out: Path,
    avg_bits: float | None,
    avg_file_bits: float | None,
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

    The sensitivity of every layer is measured on calibration data and cached in $SHIFTADD_CACHE (default:
    ~/.cache/shiftadd), so that another budget takes seconds. The choice is optimal for the measured sensitivities. Give
    the recipe and its options as for `shiftadd quantize`. Under torchrun, several processes share the measurements.
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
    from shiftadd_cli.sizes import size
    from shiftadd_cli.source import open_source
    from shiftadd_cli.storage.refusals import write_file

    start = time.monotonic()
    budget = parse_budget(avg_bits, target_size, max_divergence, cost, cost_table, max_cost, avg_file_bits)
    request = Request(budget, settings.candidates, sensitivity, keep, tie, settings.tie_fused)
    points = [] if curve is None else parse_curve(curve)
    with join_team(team_timeout) as team:
        if team.first:
            check_plan_output(out, overwrite=overwrite)
            if plot is not None:
                check_plot_output(plot, out, overwrite=overwrite)
        source = open_source(model, dtype=settings.dtype, trust_remote_code=trust_remote_code)
        job = AllocationJob.prepare(source, settings, request, team=team)
        others = [job.with_budget(point) for point in points]
        sensitivities = job.sensitivities()
    if not team.first:
        return
    plan = job.choose(sensitivities)
    write_plan(plan, out)
    linears = [linear.spec for linear in job.linears]
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
