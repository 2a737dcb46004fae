"""`shiftadd evaluate --tasks`: its options and its table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    import torch

    from shiftadd_cli.evaluation.tasks import TaskEvaluation, TaskScore

F = TypeVar("F", bound=Callable[..., Any])

# Options of one evaluation mode that have no effect in the other.
_OF_TEXT = ("dataset", "context", "max_tokens", "max_images", "save")
_OF_TASKS = ("task_path", "num_fewshot", "limit")


def task_options(function: F) -> F:
    """Add `--tasks` and its related options, which arrive as `tasks`, `task_path`, `num_fewshot` and `limit`."""
    for option in (
        click.option(
            "--limit", type=click.IntRange(min=1), help="Use at most this many documents of each task.  [default: all]"
        ),
        click.option(
            "--num-fewshot",
            type=click.IntRange(min=0),
            help="Few-shot examples in each prompt.  [default: as each task specifies]",
        ),
        click.option(
            "--task-path",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder with task files (.yaml) of your own, for --tasks.",
        ),
        click.option(
            "--tasks",
            metavar="NAME,...",
            help="Tasks of lm-evaluation-harness to score instead of a text, or 'paper' for the eight tasks of the "
            "ShiftAddLLM paper. Needs: pip install 'shiftadd-cli[eval]'.",
        ),
    ):
        function = option(function)
    return function


def show_tasks(
    models: Sequence[str],
    tasks: str,
    *,
    task_path: Path | None,
    fewshot: int | None,
    limit: int | None,
    batch_size: int,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Score the models, and print JSON or a table with one row per metric and one column per model."""
    from shiftadd_cli.evaluation.tasks import evaluate_tasks, task_names

    result = evaluate_tasks(
        models,
        task_names(tasks),
        task_path=task_path,
        fewshot=fewshot,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    click.echo(
        json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) if as_json else _describe(result)
    )


def check_options(context: click.Context) -> None:
    """Refuse options that the chosen evaluation mode would silently ignore. Raises UsageError."""
    chosen = context.params["tasks"] is not None
    for name in _OF_TEXT if chosen else _OF_TASKS:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            cure = "leave one of them out" if chosen else "give --tasks too, or leave it out"
            raise click.UsageError(f"{option} has no effect {'with' if chosen else 'without'} --tasks; {cure}.")


def _describe(result: TaskEvaluation) -> str:
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.report.uncertainty import with_error

    header = ["task", "metric", "documents", *(model.info.spec for model in result.models)]
    rows = []
    for scores in zip(*(model.scores for model in result.models), strict=True):
        first = scores[0]
        values = [with_error(score.value, score.error, 4) for score in scores]
        rows.append([first.task, _metric(first), f"{first.samples:,}", *values])
    fewshot = "as each task specifies" if result.fewshot is None else str(result.fewshot)
    lines = [
        table(header, rows),
        "",
        f"Tasks         by lm-evaluation-harness {result.harness}, examples in the prompt: {fewshot}"
        + ("" if result.limit is None else f", the first {result.limit} documents of each"),
        f"Computed      on {result.device}: "
        + ", ".join(f"{model.info.spec} in {model.info.dtype}, {model.seconds:.0f} s" for model in result.models),
    ]
    return "\n".join(lines)


def _metric(score: TaskScore) -> str:
    """The metric's name with its filter, if any, and its better direction."""
    arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}[score.higher_is_better]
    return score.metric + ("" if score.filter == "none" else f", {score.filter}") + arrow
