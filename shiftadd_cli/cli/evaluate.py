"""`shiftadd evaluate`: measure models on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shiftadd_cli.cli.scoring import scoring_options
from shiftadd_cli.cli.tasks import check_options, show_tasks, task_options

if TYPE_CHECKING:
    from shiftadd_cli.evaluation.compare import Evaluation, Measured


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--against", metavar="ORIGINAL", help="Model to measure KL divergence and top-token agreement from.")
@click.option(
    "--dataset",
    metavar="NAME|FILE",
    default="builtin",
    show_default=True,
    help="Test text: 'builtin' (held-out documentation of Python, needs no download), wikitext2, c4, ptb, or a .txt, "
    ".jsonl (field 'text') or .parquet (column 'text') file.",
)
@scoring_options
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Windows run at once; more needs more memory.",
)
@click.option(
    "--device", default="auto", show_default=True, help="Where to compute: 'auto', 'cpu', 'cuda', 'cuda:1', ..."
)
@task_options
@click.option(
    "--save",
    is_flag=True,
    help="Keep what was measured in evaluation.json in each compressed MODEL, for `shiftadd report`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on standard output.")
def evaluate(
    models: tuple[str, ...],
    against: str | None,
    dataset: str,
    context: int,
    max_tokens: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    tasks: str | None,
    task_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    save: bool,
    as_json: bool,
) -> None:
    """Measure the perplexity of each MODEL, and with --against its distance from the original.

    MODEL is a folder written by `shiftadd quantize`, or an original: a hub id, a folder with safetensors, a .gguf file,
    or `demo`. The text is tokenised as one string and cut into windows; every token but each window's first is scored.
    With --tasks the models answer those instead, and the original of --against answers first.
    """
    check_options(click.get_current_context())
    from transformers.utils import logging

    from shiftadd_cli.device import choose_device
    from shiftadd_cli.evaluation import compare
    from shiftadd_cli.report.evaluation_file import check_saving, save_evaluations

    if save:
        check_saving(models)
    logging.disable_progress_bar()
    if tasks is not None:
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
            as_json=as_json,
        )
        return
    result = compare.evaluate(
        models,
        against=against,
        dataset=dataset,
        context=context,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=choose_device(device),
    )
    for each in result.models:
        if each.calibrated_on_test:
            click.echo(
                f"Warning: {each.info.spec} was calibrated on the very text it is measured on, which flatters it; "
                "choose another --dataset.",
                err=True,
            )
    if save:
        save_evaluations(result)
    click.echo(
        json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) if as_json else _describe(result)
    )


def _describe(result: Evaluation) -> str:
    from shiftadd_cli.report.summary import table

    everyone = ([] if result.original is None else [result.original]) + list(result.models)
    header = ["model", "perplexity", "size", "file bits/weight", "layer bits/weight", "seconds"]
    if result.original is not None:
        header[2:2] = ["KL, nats/token", "same top token"]
    rows = [_row(each, compared=result.original is not None) for each in everyone]
    part = "" if result.tokens == result.text_tokens else f" (the first of {result.text_tokens:,})"
    lines = [
        table(header, rows),
        "",
        f"Text          {result.text}: {result.tokens:,} tokens{part}",
        f"Windows       {result.windows:,} of {result.context} tokens (context), not overlapping; "
        f"{result.scored_tokens:,} tokens scored",
        f"Computed      {_computed(everyone)} on {result.device}",
    ]
    lines += [f"Calibration   {each.info.spec}: {_calibration(each)}" for each in everyone if each.info.compressed]
    if result.original is not None:
        lines.append(f"Original      {result.original.info.spec}; KL is KL(original || model)")
    return "\n".join(lines)


def _row(each: Measured, *, compared: bool) -> list[str]:
    from shiftadd_cli.report.summary import size, with_error

    info, score = each.info, each.score
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


def _computed(everyone: list[Measured]) -> str:
    """The dtype of the computation, with the stored one where they differ; one entry if all agree."""
    ways = {
        each.info.spec: each.info.dtype
        + ("" if each.info.dtype == each.info.stored_dtype else f" (stored as {each.info.stored_dtype})")
        for each in everyone
    }
    if len(set(ways.values())) == 1:
        return f"in {next(iter(ways.values()))}"
    return ", ".join(f"{name} in {way}" for name, way in ways.items())


def _calibration(each: Measured) -> str:
    return each.info.calibration or "no text named in its report"
