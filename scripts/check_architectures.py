"""Runs every architecture of the installed transformers through `shiftadd quantize`: right, refused or broken.

For every class in the mappings for causal language models and image classifiers, a separate process builds a small
random model, quantizes it and loads it again; docs/architectures.md describes the comparison.

    python scripts/check_architectures.py --only '*Gemma*'
    python scripts/check_architectures.py --jobs 2 --write docs/architectures.md

Outcomes are stored in --work: a stopped run resumes, and a run after a change of the code starts over. The exit code is
1 if a class is broken.
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
              help="File that stores the outcomes.")  # fmt: skip
@click.option("--write", type=click.Path(path_type=Path), help="Page to write, with an introduction.")
def main(only: str, jobs: int, limit: int, work: Path, write: Path | None) -> None:
    """Check every architecture, and print the table."""
    # An exception, so that the running checks are stopped too.
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
