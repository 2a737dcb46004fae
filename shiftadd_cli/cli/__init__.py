"""The `shiftadd` command: loads the verbs, and turns errors into one line and an exit code.

Exit codes: 0 success; 2 an error the user can fix (one line, `Error: ...`); 3 another process of the team failed (also
one line); 130 interrupted (143 by SIGTERM, for a run that can be resumed). Anything else is a bug in shiftadd and shows
its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from importlib import import_module
from typing import IO, Any
from urllib.parse import urlsplit

import click

from shiftadd_cli.cli.flags import with_flags
from shiftadd_cli.cli.talking import add_talk_options
from shiftadd_cli.distributed.launch import launched_size, speaks
from shiftadd_cli.errors import Interrupted, ShiftaddError
from shiftadd_cli.verbosity import Verbosity, verbosity
from shiftadd_cli.version import __version__

# Each verb is a function in the module of the same name in this package, with `_` in place of `-`.
VERBS = (
    "quantize",
    "allocate-bits",
    "evaluate",
    "inspect",
    "report",
    "cost",
    "generate",
    "benchmark",
    "linearize",
    "export",
    "push",
)

_CURES = {
    errno.ENOSPC: "the disk is full; free some space, or write to another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or write to another disk",
    errno.EACCES: "permission denied; choose a location that you can read and write",
    errno.EPERM: "permission denied; choose a location that you can read and write",
    errno.EROFS: "the file system is read-only; write to another one",
}


class _Curable(click.ClickException):
    """An error that click shows as `Error: ...` on standard error, always on one line."""

    def __init__(self, message: str, exit_code: int = ShiftaddError.exit_code) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code  # type: ignore[misc] # click declares it on the class

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the error, unless another process reports for this one."""
        if speaks():
            super().show(file)


class _Group(click.Group):
    """A group that imports each verb on first use, so that no verb pays for the imports of another."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        name = cmd_name.replace("-", "_")
        command = getattr(import_module(f"{__name__}.{name}"), name)
        assert isinstance(command, click.Command)
        add_talk_options(command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _prepare_streams()
        for argument in args:
            _check_text(argument)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        _check_hub_settings()
        if launched_size() > 1:
            # Set before torch is imported: torch reports a lost process with pages of stack frames.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        try:
            return super().invoke(ctx)
        except ShiftaddError as failure:
            _trace()
            raise _Curable(with_flags(str(failure), _all_fields(ctx)), failure.exit_code) from failure
        except OSError as failure:
            if failure.errno not in _CURES:
                raise
            _trace()
            prefix = f"{failure.filename}: " if failure.filename is not None else ""
            raise _Curable(f"{prefix}{_CURES[failure.errno]}.") from failure
        except Interrupted as stop:
            if speaks():
                click.echo(str(stop), err=True)
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt:
            if speaks():
                click.echo("Interrupted.", err=True)
            ctx.exit(130)


def _all_fields(ctx: click.Context) -> set[str]:
    """Options of all verbs as fields: the fix of an error may be an option of another verb."""
    assert isinstance(ctx.command, click.Group), "the group of verbs"
    verbs = filter(None, (ctx.command.get_command(ctx, verb) for verb in VERBS))
    options = [option for verb in verbs for option in verb.params if isinstance(option, click.Option)]
    return {name.removeprefix("--").replace("-", "_") for option in options for name in option.opts}


def _prepare_streams() -> None:
    """Make output never fail: escape characters that the terminal or pipe cannot show, and ignore closed streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process exits
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_text(argument: str) -> None:
    """Refuse an argument with bytes of another encoding: our files and the libraries only accept UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError as failure:
        encoding = sys.getfilesystemencoding()
        cure = "rename the file" if encoding == "utf-8" else "set LC_ALL=C.UTF-8, or rename the file"
        raise _Curable(f"The argument {argument!r} is not valid {encoding} text; {cure}.") from failure


def _check_hub_settings() -> None:
    """Refuse settings that make the import of the hub client fail."""
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError as failure:
        raise _Curable(f"HF_ENDPOINT is {os.environ['HF_ENDPOINT']!r}, which is not a URL; unset it.") from failure
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        value = os.environ.get(name)
        try:
            int(value or 0)
        except ValueError as failure:
            raise _Curable(f"{name} is {value!r} and must be a number of seconds, such as 10.") from failure
        if value == "":
            raise _Curable(f"{name} is empty; set it to a number of seconds, such as 10, or unset it.")


def _trace() -> None:
    """Print the traceback of the current error if --verbose was given."""
    if verbosity() is Verbosity.VERBOSE and speaks():
        traceback.print_exc()


@click.group(cls=_Group, name="shiftadd", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shiftadd")
def main() -> None:
    """Compress language and vision models into binary matrices with power-of-two scales, without training."""
