"""Compares the quality of compression methods: perplexity, divergence and agreement at the same bit widths.

Every method at every bit width is one row: our own command quantizes it in a separate process, then it is measured
against the original. Finished rows are files in the work folder, so a killed run resumes where it stopped, and rows of
earlier runs with the same settings are reused. The results are `table.md` and `table.json` in that folder.

    python scripts/benchmark_quality.py demo --methods default,gptq,rtn,default:group_size=128,offset=false \\
        --bits 2,3,4 --test builtin --work out/quality

A method is a packaged recipe, the path of a recipe file, or `peer:NAME` for another library (pip install '.[peers]').
Changes to fields of its recipe follow after a colon.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from experiments.quality.bench import TextBench
from experiments.quality.conditions import Conditions, name_tests
from experiments.quality.methods import parse_methods, rows_of
from experiments.quality.options import Widths, comparison_options, show_table
from experiments.quality.peers import PEERS
from experiments.quality.table import as_json, as_markdown

from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.errors import ShiftaddError
from shiftadd_cli.recipe_file import packaged_names


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--methods",
    multiple=True,
    default=("default,gptq,rtn,shiftaddllm-acc,shiftaddllm-lat",),
    show_default=True,
    help=f"Methods to compare: {', '.join(packaged_names())}, a recipe file, "
    f"{', '.join(f'peer:{name}' for name in PEERS)}; each with :field=value,... for changes.",
)
@click.option("--bits", type=Widths(), default="2,3,4", show_default=True, help="Planes per weight.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@comparison_options
def main(
    model: str,
    methods: tuple[str, ...],
    bits: tuple[int, ...],
    calibration: str,
    samples: int,
    seq_len: int,
    seed: int,
    tests: tuple[str, ...],
    context: int | None,
    max_tokens: int | None,
    dtype: str,
    work: Path,
    keep_artifacts: bool,
    together: int,
) -> None:
    """Compare methods on MODEL (a hub id, a folder, a .gguf file or `demo`)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        conditions = Conditions(
            model, calibration, samples, seq_len, seed, name_tests(tests), context, max_tokens, dtype
        )
        # Resolve every row before making the first: a typo in the last method must not cost a night.
        parsed = parse_methods(methods)
        cells = [conditions.cell(method, width) for method, width in rows_of(parsed, bits)]
        bench = TextBench(conditions, cells, work, together, keep_artifacts, lambda line: click.echo(line, err=True))
        show_table(bench, work, as_json, as_markdown)
    except ShiftaddError as error:
        raise usage_error(error) from error
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
