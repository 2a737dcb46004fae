"""`shiftadd report`: rewrite the page of a checkpoint, or compare several checkpoints on one page."""

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
    help="Page to write.  [default: report.html in OUT, for a single OUT]",
)
@remote_code_option
def report(folders: tuple[Path, ...], page: Path | None, trust_remote_code: bool) -> None:
    """Rewrite the page of OUT with the results of `shiftadd evaluate --save`, or compare several OUT on one page.

    The page is a single self-contained HTML file.
    """
    from shiftadd_cli.errors import OutputError
    from shiftadd_cli.report.page import PAGE_FILE, open_run, render_page
    from shiftadd_cli.storage.refusals import write_file

    if page is None and len(folders) > 1:
        raise OutputError("A page about several checkpoints needs a file of its own; give it with -o.")
    path = folders[0] / PAGE_FILE if page is None else page
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give a file to -o, such as {path / PAGE_FILE}.")
    text = render_page([open_run(folder, trust_remote_code=trust_remote_code) for folder in folders])
    write_file(path, text)
    click.echo(f"Written to {path}")
