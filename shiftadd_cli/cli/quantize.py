"""`shiftadd quantize`: compress a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shiftadd_cli.cli.options import (
    a_model,
    overrides_from,
    recipe_choice,
    recipe_options,
    remote_code_option,
    team_timeout_option,
)

if TYPE_CHECKING:
    from shiftadd_cli.pipeline.plan import Plan


@click.command()
@click.argument("model", shell_complete=a_model)
@click.option(
    "-o", "--output", "out", metavar="OUT", type=click.Path(path_type=Path), required=True, help="Output folder."
)
@recipe_choice
@recipe_options
@click.option("--dry-run", is_flag=True, help="Show the plan and stop; only reads file headers.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a shiftadd checkpoint.")
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Continue an earlier run of the same command that was stopped; --no-resume starts over.",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Memory limit, such as 4GB: a run that is expected to need more is refused before it starts.",
)
@remote_code_option
@team_timeout_option
def quantize(
    model: str,
    out: Path,
    recipe: str,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    max_memory: str | None,
    trust_remote_code: bool,
    team_timeout: float,
    **fields: Any,
) -> None:
    """Compress MODEL and write a checkpoint folder that transformers loads.

    MODEL is a hub id, a folder with safetensors files, a .gguf file, or `demo` (SmolLM2-135M-Instruct). It can be a
    decoder language model, an image classifier or a vision encoder. To continue a stopped run after its last finished
    block, give the same command again. Under torchrun, several processes share the work.
    """
    from shiftadd_cli.recipe import Recipe

    settings = Recipe.load(recipe, overrides_from(fields))
    from shiftadd_cli.cli.describe import describe_plan
    from shiftadd_cli.cli.summary import summarize
    from shiftadd_cli.distributed.launch import join_team
    from shiftadd_cli.pipeline.job import Job
    from shiftadd_cli.signals import terminable
    from shiftadd_cli.verbosity import tell

    def show(plan: Plan) -> None:
        tell(describe_plan(plan) + "\n")

    with join_team(team_timeout) as team:
        job = Job.prepare(
            model,
            out,
            settings,
            overwrite=overwrite,
            resume=resume,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            team=team,
        )
        if dry_run:
            if team.first:
                click.echo(describe_plan(job.plan))
            return
        if team.first:
            show(job.plan)
        with terminable():
            report = job.run(sys.argv[1:], announce=show if team.first else None)
    if report is not None:
        tell()
        click.echo(summarize(report, str(out)))
