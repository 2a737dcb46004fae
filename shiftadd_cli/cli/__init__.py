"""The command `shiftadd`: finds the verbs, and turns what went wrong into one line and an exit code.

Exit codes: 0 done, 2 the user can cure it (one line, `Error: ...`), 3 another process of a team failed (one line too),
130 interrupted (143 by SIGTERM, for a run that can go on). Anything else is a defect of ours and shows its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Collection
from importlib import import_module
from typing import IO, Any
from urllib.parse import urlsplit

import click

from shiftadd_cli.cli.talking import add_talk_options
from shiftadd_cli.distributed.launch import launched_size, speaks
from shiftadd_cli.errors import Interrupted, ShiftaddError
from shiftadd_cli.verbosity import Verbosity, verbosity
from shiftadd_cli.version import __version__

# Each verb is the attribute of that name, with `_` for `-`, in the module of that name in this package.
VERBS = (
    "quantize",
    "allocate-bits",
    "evaluate",
    "inspect",
    "report",
    "cost",
    "generate",
    "benchmark",
    "export",
    "push",
)

# A field, or a field and its value, as errors name them.
_FIELD = re.compile(r"`(?P<field>[a-z_]+)(?:=(?P<value>[^`]*))?`")

_CURES = {
    errno.ENOSPC: "the disk is full; free some space, or write to another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or write to another disk",
    errno.EACCES: "permission denied; choose a place that you may read and write",
    errno.EPERM: "permission denied; choose a place that you may read and write",
    errno.EROFS: "the file system is read-only; write to another one",
}


class _Curable(click.ClickException):
    """Shown by click as `Error: ...` on standard error, always on one line."""

    def __init__(self, message: str, exit_code: int = ShiftaddError.exit_code) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code  # type: ignore[misc] # click declares it as of the class

    def show(self, file: IO[Any] | None = None) -> None:
        """Nothing of a process for which another speaks."""
        if speaks():
            super().show(file)


class _Group(click.Group):
    """A group whose verbs are imported when they are asked for, so that none pays for the imports of another."""

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
            # Before torch is imported, which tells of a process that is gone in pages of stack frames.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        try:
            return super().invoke(ctx)
        except ShiftaddError as failure:
            _trace()
            raise _Curable(_with_flags(str(failure), ctx), failure.exit_code) from failure
        except OSError as failure:
            if failure.errno not in _CURES:
                raise
            _trace()
            place = f"{failure.filename}: " if failure.filename is not None else ""
            raise _Curable(f"{place}{_CURES[failure.errno]}.") from failure
        except Interrupted as stop:
            if speaks():
                click.echo(str(stop), err=True)
            ctx.exit(stop.exit_code)
        except KeyboardInterrupt:
            if speaks():
                click.echo("Interrupted.", err=True)
            ctx.exit(130)


def _with_flags(message: str, ctx: click.Context) -> str:
    """The text of an error with the flags of the command in place of fields: `seq_len` becomes --seq-len, `seq_len=64`
    becomes --seq-len 64, and `resume=False` --no-resume."""
    assert isinstance(ctx.command, click.Group), "the group of verbs"
    command = ctx.command.get_command(ctx, ctx.invoked_subcommand or "")
    options = [option for option in command.params if isinstance(option, click.Option)] if command is not None else []
    # Options of another verb or recipe may be the cure.
    names = {name.removeprefix("--").replace("-", "_") for option in options for name in option.opts}

    def flag(match: re.Match[str]) -> str:
        field, value = match["field"], match["value"]
        if field not in names and field not in _fields():
            return match[0]
        text = field.replace("_", "-")
        if value == "False":
            return f"--no-{text}"
        return f"--{text}" if value in (None, "True") else f"--{text} {value}"

    return _FIELD.sub(flag, message)


def _fields() -> Collection[str]:
    from shiftadd_cli.recipe import Recipe

    return Recipe.model_fields


def _prepare_streams() -> None:
    """Let output never fail: what a terminal or pipe cannot show is escaped, and what is closed is passed over."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_text(argument: str) -> None:
    """Refuse an argument that holds bytes of another encoding: libraries and files of ours take UTF-8 alone."""
    try:
        argument.encode()
    except UnicodeEncodeError as failure:
        encoding = sys.getfilesystemencoding()
        cure = "rename the file" if encoding == "utf-8" else "set LC_ALL=C.UTF-8, or rename the file"
        raise _Curable(f"The argument {argument!r} is no text in {encoding}; {cure}.") from failure


def _check_hub_settings() -> None:
    """Refuse settings on which the hub's client fails when it is imported."""
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError as failure:
        raise _Curable(f"HF_ENDPOINT is {os.environ['HF_ENDPOINT']!r}, which is no address; unset it.") from failure
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        value = os.environ.get(name)
        try:
            int(value or 0)
        except ValueError as failure:
            raise _Curable(f"{name} is {value!r} and must be a number of seconds, such as 10.") from failure
        if value == "":
            raise _Curable(f"{name} is empty and must be a number of seconds, such as 10; or unset it.")


def _trace() -> None:
    """Where the error in hand arose, if that was asked for."""
    if verbosity() is Verbosity.VERBOSE and speaks():
        traceback.print_exc()


@click.group(cls=_Group, name="shiftadd", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shiftadd")
def main() -> None:
    """Compress language and vision models into binary matrices with power-of-two scales, without training."""
