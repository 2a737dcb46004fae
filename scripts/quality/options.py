"""Options that all comparisons on texts have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from shiftadd_cli.cli.scoring import scoring_options

POSITIVE = click.IntRange(min=1)

F = TypeVar("F", bound=Callable[..., Any])


def comparison_options(function: F) -> F:
    """Add what is calibrated and measured on, and how: `calibration`, `samples`, `seq_len`, `tests`, those of
    `scoring_options`, `work`, `keep_artifacts` and `together`."""
    work = click.Path(file_okay=False, path_type=Path)
    for option in (
        click.option(
            "--together",
            type=POSITIVE,
            default=3,
            show_default=True,
            help="Compressed models measured beside one run of the original; more saves time and needs more memory.",
        ),
        click.option("--keep-artifacts", is_flag=True, help="Keep the compressed models in --work."),
        click.option("--work", type=work, required=True, help="Folder of rows, logs and the table."),
        scoring_options,
        click.option(
            "--test", "tests", multiple=True, default=("builtin",), show_default=True, help="Text to measure on."
        ),
        click.option(
            "--seq-len", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in each window."
        ),
        click.option("--samples", type=POSITIVE, default=128, show_default=True, help="Calibration windows."),
        click.option("--calibration", default="builtin", show_default=True, help="Text to calibrate on."),
    ):
        function = option(function)
    return function
