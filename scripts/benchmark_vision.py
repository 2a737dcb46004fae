"""Compares the quality of compression methods on vision models: accuracy, divergence and agreement at equal bit widths.

Every method at every bit width is one row, as in `benchmark_quality.py`: our own command quantizes it in a separate
process, then it is measured against the original. Finished rows are files in the work folder, so a killed run resumes
where it stopped. The results are `table.md` and `table.json` in that folder.

    python scripts/benchmark_vision.py MODEL --calibration images/train --test images/test \\
        --methods default,gptq,rtn,default:avg_bits=2.5 --bits 2,3,4 --work out/vision

A method is a packaged recipe or the path of a recipe file. Changes to fields of its recipe follow after a colon.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from experiments.quality.methods import parse_methods, rows_of
from experiments.quality.options import Widths, show_table
from experiments.vision.bench import ImageBench
from experiments.vision.conditions import ImageConditions
from experiments.vision.table import as_json, as_markdown

from shiftadd_cli.cli.flags import usage_error
from shiftadd_cli.cli.options import dtype_option
from shiftadd_cli.errors import ShiftaddError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--methods", multiple=True, default=("default,gptq,rtn",), show_default=True, help="Methods to compare.")
@click.option("--bits", type=Widths(), default="2,3,4", show_default=True, help="Planes per weight.")
@click.option("--calibration", default="builtin", show_default=True, help="Images to calibrate on.")
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True, help="Calibration images.")
@click.option("--test", default="builtin", show_default=True, help="Images to measure on.")
@click.option("--max-images", type=click.IntRange(min=1), help="Upper limit for the test images.  [default: all]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the table.")
@dtype_option
def main(
    model: str,
    methods: tuple[str, ...],
    bits: tuple[int, ...],
    calibration: str,
    samples: int,
    test: str,
    max_images: int | None,
    seed: int,
    work: Path,
    dtype: str,
) -> None:
    """Compare methods on the vision model MODEL (a hub id or a folder)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        conditions = ImageConditions(model, calibration, samples, seed, test, max_images, dtype)
        parsed = parse_methods(methods)
        cells = [conditions.cell(method, width) for method, width in rows_of(parsed, bits)]
        bench = ImageBench(conditions, cells, work, say=lambda line: click.echo(line, err=True))
        show_table(bench, work, as_json, as_markdown)
    except ShiftaddError as error:
        raise usage_error(error) from error
    if bench.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
