"""Fields in messages of the library, shown as flags of the command line."""

from __future__ import annotations

import re
from collections.abc import Collection

import click

# A field name, or `field=value`, as messages show them.
_FIELD = re.compile(r"`(?P<field>[a-z_]+)(?:=(?P<value>[^`]*))?`")


def with_flags(message: str, fields: Collection[str]) -> str:
    """The message with flags in place of these fields: `seq_len` becomes --seq-len, `seq_len=64` becomes --seq-len 64,
    and `resume=False` becomes --no-resume. Other words in backticks stay."""

    def flag(match: re.Match[str]) -> str:
        field, value = match["field"], match["value"]
        if field not in fields:
            return match[0]
        text = field.replace("_", "-")
        if value == "False":
            return f"--no-{text}"
        return f"--{text}" if value in (None, "True") else f"--{text} {value}"

    return _FIELD.sub(flag, message)


def usage_error(error: Exception) -> click.UsageError:
    """The error of a command that runs, with flags in place of its options."""
    fields = {option.name or "" for option in click.get_current_context().command.params}
    return click.UsageError(with_flags(str(error), fields))
