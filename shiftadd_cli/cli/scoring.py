"""Options that say how models are scored on a text, for `shiftadd evaluate` and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from shiftadd_cli.cli.computing import dtype_option

F = TypeVar("F", bound=Callable[..., Any])


def scoring_options(function: F) -> F:
    """Add `--context`, `--max-tokens` and `--dtype`, which arrive as `context`, `max_tokens` and `dtype`."""
    for option in (
        dtype_option,
        click.option(
            "--max-tokens",
            type=click.IntRange(min=2),
            help="Use only the first tokens of each text.  [default: all]",
        ),
        click.option(
            "--context",
            type=click.IntRange(min=2),
            help="Tokens per window; windows do not overlap.  "
            "[default: 512, or as many as the models have positions for]",
        ),
    ):
        function = option(function)
    return function
