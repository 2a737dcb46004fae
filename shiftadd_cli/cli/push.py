"""`shiftadd push`: upload a compressed model to the hub."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to; created if missing.  [default: main]")
@click.option("--public", is_flag=True, help="Make the repository public if it has to be created.")
@click.option("--message", default="Upload with shiftadd", show_default=True, help="Commit message.")
@click.option("--dry-run", is_flag=True, help="Check OUT, show the files to upload, and stop.")
def push(folder: Path, repo: str, revision: str | None, public: bool, message: str, dry_run: bool) -> None:
    """Upload the checkpoint OUT to the repository REPO (NAME or OWNER/NAME) of the Hugging Face hub.

    OUT is checked as by `shiftadd inspect --verify` and uploaded in one commit. To continue an interrupted upload, give
    the same command again. The repository is created if it does not exist; it is private unless you give --public.
    """
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.hub.push import Push, require_token
    from shiftadd_cli.sizes import size

    if not dry_run:
        # Checked first, since preparing the upload reads all of OUT.
        require_token()
    plan = Push.prepare(folder, repo, revision=revision, private=not public)
    rows = [[name, size(nbytes)] for name, nbytes in plan.files.items()]
    click.echo(table(["file", "size"], rows) + f"\n\nTo            {repo}{'' if revision is None else ', ' + revision}")
    click.echo(f"Size          {size(plan.nbytes)} in {len(plan.files)} files")
    if not dry_run:
        click.echo(f"Uploaded      {plan.run(message)}")
