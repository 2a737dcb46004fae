"""The reference of verbs from the commands themselves; recipe options and errors from their classes."""

from __future__ import annotations

import inspect
import re

import click

from pages.text import table
from shiftadd_cli import errors
from shiftadd_cli.cli import VERBS, main
from shiftadd_cli.cli.options import default_text, option_name
from shiftadd_cli.recipe import Recipe


def verb_reference(name: str) -> str:
    """Usage, help text and options of a verb; recipe options are named but not repeated."""
    command, context = _command(name)
    usage = " ".join(command.collect_usage_pieces(context))
    paragraphs = [" ".join(paragraph.split()) for paragraph in inspect.cleandoc(command.help or "").split("\n\n")]
    own = [option for option in command.params if isinstance(option, click.Option) and not _of_recipe(option)]
    fields = {option.name for option in command.params if _of_recipe(option)}
    lines = [f"    shiftadd {name} {usage}", "", *(f"{_plain(paragraph)}\n" for paragraph in paragraphs)]
    lines.append(table(("option", "meaning"), [_option_row(option, context) for option in own]))
    if fields:
        missing = [option_name(field) for field in Recipe.model_fields if field not in fields]
        exceptions = f" except {', '.join(f'`{option}`' for option in missing)}" if missing else ""
        lines.append(f"It also takes all [options of the recipe](#options-of-the-recipe){exceptions}.\n")
    return "\n".join(lines)


def verb_table() -> str:
    """The line of every verb in `shiftadd --help`."""
    rows = [(f"[`{name}`](#{name})", _plain(_command(name)[0].get_short_help_str(200))) for name in VERBS]
    return table(("verb", "what it does"), rows)


def option_table() -> str:
    """One row per recipe field: option, default, description."""
    rows = [
        (f"`{option_name(name)}`", default_text(name), _plain(field.description or ""))
        for name, field in Recipe.model_fields.items()
    ]
    return table(("option", "default", "meaning"), rows)


def error_table() -> str:
    """Every class of errors that users see, with its exit code."""
    classes = [
        error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, errors.ShiftaddError)
    ]
    ordered = sorted(classes, key=lambda error: inspect.getsourcelines(error)[1])
    rows = [
        (f"`{error.__name__}`", str(error.exit_code), _plain(" ".join((error.__doc__ or "").split())))
        for error in ordered
        if error is not errors.ShiftaddError
    ]
    return table(("error", "exit code", "meaning"), rows)


def _command(name: str) -> tuple[click.Command, click.Context]:
    parent = main.make_context("shiftadd", [], resilient_parsing=True)
    command = main.get_command(parent, name)
    if command is None:
        raise SystemExit(f"There is no verb {name!r}.")
    return command, click.Context(command, info_name=name, parent=parent)


def _of_recipe(parameter: click.Parameter) -> bool:
    name = parameter.name or ""
    return name in Recipe.model_fields and option_name(name) in parameter.opts and parameter.default is None


def _option_row(option: click.Option, context: click.Context) -> tuple[str, str]:
    record = option.get_help_record(context)
    assert record is not None, "no option is hidden"
    # A bar inside backticks ends the cell in some Markdown readers, and shows its backslash in others.
    shown = f"<code>{record[0].replace('|', '&#124;')}</code>" if "|" in record[0] else f"`{record[0]}`"
    return shown, _plain(" ".join(record[1].split()))


def _plain(text: str) -> str:
    """Escape characters that Markdown would take for markup."""
    return re.sub(r"[*<]", r"\\\g<0>", text)
