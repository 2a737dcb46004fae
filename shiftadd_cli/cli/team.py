"""The verbs that several processes can share, see `distributed`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from shiftadd_cli.distributed.launch import TIMEOUT_SECONDS, join_team, launched_size
from shiftadd_cli.errors import Interrupted, ShiftaddError

if TYPE_CHECKING:
    from shiftadd_cli.distributed.team import Team

team_timeout_option = click.option(
    "--team-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=TIMEOUT_SECONDS,
    show_default=True,
    help="Where torchrun started several processes: how long they wait for one that has stopped answering.",
)


@contextmanager
def of_the_team(timeout: float) -> Iterator[Team]:
    """The team of this process. What goes wrong in a process that is not the first is told by the first alone."""
    follower = False
    try:
        with join_team(timeout) as team:
            follower = not team.first
            yield team
    except (ShiftaddError, Interrupted) as failure:
        if not follower or launched_size() == 1:
            raise
        sys.exit(failure.exit_code)
