"""`shiftadd evaluate`: measure models on a text or on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shiftadd_cli.cli.evaluate_images import calibrations, computed, describe_images
from shiftadd_cli.cli.options import a_model, remote_code_option, scoring_options, team_timeout_option
from shiftadd_cli.cli.tasks import check_options, show_tasks, task_options

if TYPE_CHECKING:
    from shiftadd_cli.evaluation.compare import Evaluation
    from shiftadd_cli.evaluation.perplexity import Score
    from shiftadd_cli.evaluation.result import ModelResult


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, shell_complete=a_model)
@click.option(
    "--against",
    metavar="ORIGINAL",
    shell_complete=a_model,
    help="Reference model for KL divergence and top-token agreement.",
)
@click.option(
    "--dataset",
    metavar="NAME|FILE",
    default="builtin",
    show_default=True,
    help="Test text: 'builtin' (held-out documentation of Python, needs no download), wikitext2, c4, ptb, or a .txt, "
    ".jsonl or .parquet file (field or column 'text', or 'messages' for conversations). Test images for vision models: "
    "'builtin' (held-out digits from scikit-learn), a folder (one subfolder per class, or a table of labels), a "
    ".parquet file, or a hub dataset as NAME or NAME:SPLIT.",
)
@click.option(
    "--max-images",
    type=click.IntRange(min=1),
    help="Use at most this many images, evenly spaced over the data set.  [default: all]",
)
@scoring_options
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Batch size, in windows or images; larger batches need more memory.",
)
@click.option(
    "--device", default="auto", show_default=True, help="Device to run on: 'auto', 'cpu', 'cuda', 'cuda:1', ..."
)
@remote_code_option
@team_timeout_option
@task_options
@click.option(
    "--save",
    is_flag=True,
    help="Save the results to evaluation.json in each compressed MODEL, for `shiftadd report`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on standard output.")
def evaluate(
    models: tuple[str, ...],
    against: str | None,
    dataset: str,
    context: int | None,
    max_tokens: int | None,
    max_images: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    team_timeout: float,
    tasks: str | None,
    task_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    save: bool,
    as_json: bool,
) -> None:
    """Measure the perplexity or image accuracy of each MODEL and, with --against, its distance from the original.

    MODEL is a folder written by `shiftadd quantize`, or an original: a hub id, a folder with safetensors files, a .gguf
    file, or `demo`. The text is tokenised as one string and cut into windows. Each window begins with the special
    tokens that the tokenizer puts before a text, such as <bos>. Every token after these is scored; without special
    tokens, every token after the first. With --tasks, the models are scored on those tasks instead, and the original
    of --against comes first. Under torchrun, several processes share the windows, and each loads all models. Vision
    models are measured on images: top-1 and top-5 accuracy, or nearest-neighbour accuracy for models without a head.
    """
    check_options(click.get_current_context())
    from transformers.utils import logging

    from shiftadd_cli.device import choose_device
    from shiftadd_cli.distributed.launch import join_team, launched_size
    from shiftadd_cli.errors import RecipeError
    from shiftadd_cli.evaluation import compare
    from shiftadd_cli.evaluation.compare_images import ImageEvaluation
    from shiftadd_cli.report.evaluation_file import check_saving, save_evaluations

    if save:
        check_saving(models)
    logging.disable_progress_bar()
    if tasks is not None:
        if launched_size() > 1:
            raise RecipeError("--tasks runs in one process; run this without torchrun.")
        everyone = ([] if against is None else [against]) + list(models)
        show_tasks(
            everyone,
            tasks,
            task_path=task_path,
            fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            dtype=dtype,
            device=choose_device(device),
            trust_remote_code=trust_remote_code,
            as_json=as_json,
        )
        return
    with join_team(team_timeout) as team:
        result = compare.evaluate(
            models,
            against=against,
            dataset=dataset,
            context=context,
            max_tokens=max_tokens,
            max_images=max_images,
            batch_size=batch_size,
            dtype=dtype,
            device=choose_device(device),
            trust_remote_code=trust_remote_code,
            team=team,
        )
    if not team.first:
        return
    for measured in result.models:
        if measured.calibrated_on_test:
            click.echo(
                f"Warning: {measured.info.spec} was calibrated on the very data it is measured on, which flatters it; "
                "choose another --dataset.",
                err=True,
            )
    if save:
        save_evaluations(result)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(describe_images(result) if isinstance(result, ImageEvaluation) else _describe(result))


def _describe(result: Evaluation) -> str:
    from shiftadd_cli.cli.summary import table

    everyone = ([] if result.original is None else [result.original]) + list(result.models)
    header = ["model", "perplexity", "size", "file bits/weight", "layer bits/weight", "seconds"]
    if result.original is not None:
        header[2:2] = ["KL, nats/token", "same top token"]
    rows = [_row(model, compared=result.original is not None) for model in everyone]
    part = "" if result.tokens == result.text_tokens else f" (the first of {result.text_tokens:,})"
    longest = ", as many as there are positions for" if result.context == result.positions else ""
    lines = [
        table(header, rows),
        "",
        f"Text          {result.text}: {result.tokens:,} tokens{part}",
        f"Windows       {result.windows:,} of {result.context} tokens (context{longest}), not overlapping, which begin "
        f"with {result.window_start or 'no special token'}; {result.scored_tokens:,} tokens scored",
        f"Computed      {computed(everyone)} on {result.device}",
        *calibrations(everyone),
    ]
    if result.original is not None:
        lines.append(f"Original      {result.original.info.spec}; KL is KL(original || model)")
    return "\n".join(lines)


def _row(model: ModelResult[Score], *, compared: bool) -> list[str]:
    from shiftadd_cli.report.uncertainty import with_error
    from shiftadd_cli.sizes import size

    info, score = model.info, model.score
    layers = "-" if info.quantized_bits_per_weight is None else f"{info.quantized_bits_per_weight:.3f}"
    row = [
        info.spec,
        with_error(score.perplexity, score.perplexity_error, 3),
        size(info.file_bytes),
        f"{info.file_bits_per_weight:.3f}",
        layers,
        f"{score.seconds:.1f}",
    ]
    if compared:
        row[2:2] = [
            with_error(score.kl, score.kl_error, 4),
            "-" if score.agreement is None else f"{score.agreement:.2%}",
        ]
    return row
