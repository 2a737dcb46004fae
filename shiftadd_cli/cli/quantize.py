"""`shiftadd quantize`: compress a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from shiftadd_cli.cli.options import overrides_from, recipe_choice, recipe_options


@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", "out", metavar="OUT", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
@recipe_choice
@recipe_options
@click.option("--dry-run", is_flag=True, help="Show the plan and stop; reads headers only.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a checkpoint of ours.")
def quantize(model: str, out: Path, recipe: str, dry_run: bool, overwrite: bool, **fields: Any) -> None:
    """Compress MODEL and write a checkpoint folder that transformers loads.

    MODEL is a hub id, a folder with safetensors, a .gguf file, or `demo` (SmolLM2-135M-Instruct).
    """
    from shiftadd_cli.recipe import Recipe

    settings = Recipe.load(recipe, overrides_from(fields))
    from shiftadd_cli.artifact.output import check_output
    from shiftadd_cli.device import choose_device
    from shiftadd_cli.pipeline.describe import describe_plan
    from shiftadd_cli.pipeline.plan import make_plan
    from shiftadd_cli.pipeline.run import load_calibration, run_plan
    from shiftadd_cli.progress import progress
    from shiftadd_cli.report.summary import summarize
    from shiftadd_cli.source import open_source

    local = Path(model)
    check_output(out, local if local.exists() else None, overwrite=overwrite)
    device = choose_device(settings.device)
    source = open_source(model, dtype=settings.dtype)
    plan = make_plan(source, settings)
    click.echo(describe_plan(plan), err=True)
    if dry_run:
        return
    check_output(out, local if local.exists() else None, overwrite=overwrite, expected_bytes=plan.after_bytes)
    calibration = load_calibration(plan)
    report = run_plan(
        plan,
        calibration,
        out,
        device=device,
        overwrite=overwrite,
        command=sys.argv[1:],
        progress=lambda names, text: progress(names, total=len(names), desc=text),
    )
    click.echo("", err=True)
    click.echo(summarize(report, str(out)))
