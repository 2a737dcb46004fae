"""Options that all comparisons share, and their last step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from experiments.quality.rows import write_text
from shiftadd_cli.cli.options import scoring_options

POSITIVE = click.IntRange(min=1)


class _Fills(Protocol):
    def fill(self, finished: Callable[[], None]) -> None: ...


F = TypeVar("F", bound=Callable[..., Any])
B = TypeVar("B", bound=_Fills)


class Widths(click.ParamType):
    """Bit widths such as `2,3,4`."""

    name = "n,n,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() for part in parts):
            self.fail(f"{value!r} is not a list of whole numbers such as 2,3,4.", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


def comparison_options(function: F) -> F:
    """Add the options of calibration and measurement: `calibration`, `samples`, `seq_len`, `tests`, those of
    `scoring_options`, `work`, `keep_artifacts` and `together`."""
    work = click.Path(file_okay=False, path_type=Path)
    for option in (
        click.option(
            "--together",
            type=POSITIVE,
            default=3,
            show_default=True,
            help="Compressed models measured with one run of the original; more saves time and needs more memory.",
        ),
        click.option("--keep-artifacts", is_flag=True, help="Keep the compressed models in --work."),
        click.option("--work", type=work, required=True, help="Folder for rows, logs and the table."),
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


def show_table(bench: B, work: Path, as_json: Callable[[B], str], as_markdown: Callable[[B], str]) -> None:
    """Fill a bench, rewrite its table in the folder `work` whenever there are new rows, and print the table."""

    def write_table() -> None:
        write_text(work / "table.json", as_json(bench))
        write_text(work / "table.md", as_markdown(bench))

    bench.fill(write_table)
    click.echo(as_markdown(bench))
