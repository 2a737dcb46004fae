"""`--quiet` and `--verbose`, which every verb has."""

from __future__ import annotations

import os
from functools import partial

import click

from shiftadd_cli.verbosity import Verbosity, set_verbosity, verbosity

# Read by transformers and huggingface_hub when they are imported.
_LIBRARIES = {"TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"}


def add_talk_options(command: click.Command) -> None:
    """Give a command the two options, if it lacks them."""
    if _QUIET not in command.params:
        command.params += [_QUIET, _VERBOSE]


def _choose(context: click.Context, level: Verbosity, asked: bool) -> None:
    if not asked:
        return
    # Several commands may run in one process.
    end = context.find_root().call_on_close
    if verbosity() not in (Verbosity.NORMAL, level):
        raise click.UsageError("--quiet and --verbose ask for opposites; leave one of them out.")
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
    callback=lambda context, _, asked: _choose(context, Verbosity.QUIET, asked),
    help="Say nothing but the result, warnings and errors.",
)
_VERBOSE = click.Option(
    ["-v", "--verbose"],
    is_flag=True,
    expose_value=False,
    callback=lambda context, _, asked: _choose(context, Verbosity.VERBOSE, asked),
    help="Show what transformers and the hub's client say as well, and where an error arose.",
)
