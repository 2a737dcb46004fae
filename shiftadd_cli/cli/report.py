"""`shiftadd report`: the page about a checkpoint, made anew, or about several beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from shiftadd_cli.cli.options import remote_code_option


@click.command()
@click.argument("folders", metavar="OUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "page",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Page to write.  [default: report.html in OUT, if it is one]",
)
@remote_code_option
def report(folders: tuple[Path, ...], page: Path | None, trust_remote_code: bool) -> None:
    """Write the page about OUT anew, with what `shiftadd evaluate --save` measured since, or compare several OUT.

    The page is one HTML file that needs nothing else.
    """
    from shiftadd_cli.errors import OutputError
    from shiftadd_cli.report.page import PAGE_FILE, open_run, render_page
    from shiftadd_cli.storage.refusals import write_file

    if page is None and len(folders) > 1:
        raise OutputError("A page about several checkpoints belongs to none of them; give its file with -o.")
    place = folders[0] / PAGE_FILE if page is None else page
    if place.is_dir():
        raise OutputError(f"{place} is a folder; give a file to -o, such as {place / PAGE_FILE}.")
    text = render_page([open_run(folder, trust_remote_code=trust_remote_code) for folder in folders])
    write_file(place, text)
    click.echo(f"Written to {place}")
