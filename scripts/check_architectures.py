"""Every architecture of the installed transformers through `shiftadd quantize`: right, refused or broken.

For every class of the mappings for causal language models and image classifiers a small random model is built,
quantized and loaded again, in a process of its own; docs/architectures.md says what is compared.

    python scripts/check_architectures.py --only '*Gemma*'
    python scripts/check_architectures.py --jobs 2 --write docs/architectures.md

Outcomes are kept in --work: a run that was stopped goes on, and one after a change of the code begins anew. The exit
code is 1 where a class is broken.
"""

from __future__ import annotations

import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import click
from architectures.factory import architectures
from architectures.processes import check_all, import_everything
from architectures.rows import Rows
from architectures.table import as_markdown, as_page, summary


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="PATTERN", default="*", help="Classes whose name matches, such as '*Gemma*'.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Checks that run at once.")
@click.option("--limit", type=click.IntRange(min=1), default=180, show_default=True, help="Seconds for each check.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/architectures.jsonl"), show_default=True,
              help="File that keeps the outcomes.")  # fmt: skip
@click.option("--write", type=click.Path(path_type=Path), help="Page to write, with a line on how it was made.")
def main(only: str, jobs: int, limit: int, work: Path, write: Path | None) -> None:
    """Check every architecture, and print the table."""
    # So that the checks that run are ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import_everything()
    chosen = [architecture for architecture in architectures() if fnmatchcase(architecture.name, only)]
    if not chosen:
        raise click.UsageError(f"No class is called {only}.")
    rows = Rows(work)
    missing = rows.missing(chosen)
    for number, outcome in enumerate(check_all(missing, jobs=jobs, limit_s=limit), 1):
        rows.add(outcome)
        click.echo(f"[{number}/{len(missing)}] {outcome.name}: {outcome.status} {outcome.note}"[:200], err=True)
    outcomes = [rows.outcomes[architecture.name] for architecture in chosen]
    images = [architecture.name for architecture in chosen if architecture.reads_images]
    click.echo(as_markdown(outcomes, images))
    click.echo(summary(outcomes))
    if write is not None:
        write.write_text(as_page(outcomes, images))
    if any(outcome.status == "broken" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
