"""What every verb takes, from the commands themselves; options of the recipe, and errors, from their classes."""

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
    """Usage, help text and options of a verb; those that are fields of the recipe are named and not repeated."""
    command, context = _command(name)
    usage = " ".join(command.collect_usage_pieces(context))
    paragraphs = [" ".join(each.split()) for each in inspect.cleandoc(command.help or "").split("\n\n")]
    own = [each for each in command.params if isinstance(each, click.Option) and not _of_recipe(each)]
    fields = {each.name for each in command.params if _of_recipe(each)}
    lines = [f"    shiftadd {name} {usage}", "", *(f"{_plain(each)}\n" for each in paragraphs)]
    lines.append(table(("option", "meaning"), [_option_row(each, context) for each in own]))
    if fields:
        missing = [option_name(each) for each in Recipe.model_fields if each not in fields]
        but = f" but for {', '.join(f'`{each}`' for each in missing)}" if missing else ""
        lines.append(f"Besides it takes all [options of the recipe](#options-of-the-recipe){but}.\n")
    return "\n".join(lines)


def verb_table() -> str:
    """The line that `shiftadd --help` shows of every verb."""
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
    """Every class of errors that users are shown, with its exit code."""
    found = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.ShiftaddError)]
    ordered = sorted(found, key=lambda each: inspect.getsourcelines(each)[1])
    rows = [
        (f"`{each.__name__}`", str(each.exit_code), _plain(" ".join((each.__doc__ or "").split())))
        for each in ordered
        if each is not errors.ShiftaddError
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
    said = option.get_help_record(context)
    assert said is not None, "no option is hidden"
    # A bar inside backticks would end the cell for some readers of Markdown, and show its backslash for others.
    shown = f"<code>{said[0].replace('|', '&#124;')}</code>" if "|" in said[0] else f"`{said[0]}`"
    return shown, _plain(" ".join(said[1].split()))


def _plain(text: str) -> str:
    """Without what Markdown would take for markup."""
    return re.sub(r"[*<]", r"\\\g<0>", text)
