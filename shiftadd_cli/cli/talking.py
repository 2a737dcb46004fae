"""`--quiet` and `--verbose`, which every verb has."""

from __future__ import annotations

import os
from functools import partial

import click

from shiftadd_cli.verbosity import Verbosity, set_verbosity, verbosity

# Read by transformers and huggingface_hub when they are imported.
_LIBRARIES = {"TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"}


def add_talk_options(command: click.Command) -> None:
    """Add the two options to a command that lacks them."""
    if _QUIET not in command.params:
        command.params += [_QUIET, _VERBOSE]


def _choose(context: click.Context, level: Verbosity, given: bool) -> None:
    if not given:
        return
    # Several commands may run in one process, so the level is reset at the end.
    end = context.find_root().call_on_close
    if verbosity() not in (Verbosity.NORMAL, level):
        raise click.UsageError("--quiet and --verbose contradict each other; leave one of them out.")
    set_verbosity(level)
    end(lambda: set_verbosity(Verbosity.NORMAL))
    if level is Verbosity.VERBOSE:
        for variable in _LIBRARIES - os.environ.keys():
            os.environ[variable] = "info"
            end(partial(os.environ.pop, variable))


_QUIET = click.Option(
    ["-q", "--quiet"],
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, given: _choose(context, Verbosity.QUIET, given),
    help="Only print the result, warnings and errors.",
)
_VERBOSE = click.Option(
    ["-v", "--verbose"],
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, given: _choose(context, Verbosity.VERBOSE, given),
    help="Also show messages of transformers and the hub client, and tracebacks of errors.",
)
