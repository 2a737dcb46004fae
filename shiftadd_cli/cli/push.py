"""`shiftadd push`: upload a compressed model to the hub."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to, made if there is none.  [default: main]")
@click.option("--public", is_flag=True, help="Let everyone see a repository that has to be made.")
@click.option("--message", default="Upload with shiftadd", show_default=True, help="What the commit is called.")
@click.option("--dry-run", is_flag=True, help="Check OUT, show what would be uploaded, and stop.")
def push(folder: Path, repo: str, revision: str | None, public: bool, message: str, dry_run: bool) -> None:
    """Upload the checkpoint OUT to the repository REPO (NAME or OWNER/NAME) of the Hugging Face hub.

    OUT is checked as by `shiftadd inspect --verify`, and uploaded in one commit; what was not sent when an upload was
    broken off, the same command sends. The repository is made if there is none, private unless you say --public.
    """
    from shiftadd_cli.cli.summary import table
    from shiftadd_cli.hub.push import Push, require_token
    from shiftadd_cli.sizes import size

    if not dry_run:
        # Before all of OUT is read.
        require_token()
    plan = Push.prepare(folder, repo, revision=revision, private=not public)
    rows = [[name, size(nbytes)] for name, nbytes in plan.files.items()]
    click.echo(table(["file", "size"], rows) + f"\n\nTo            {repo}{'' if revision is None else ', ' + revision}")
    click.echo(f"Size          {size(plan.nbytes)} in {len(plan.files)} files")
    if not dry_run:
        click.echo(f"Uploaded      {plan.run(message)}")
