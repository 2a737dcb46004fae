"""Options shared by several verbs. Recipe options are generated from the recipe's fields, so the two never diverge."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.recipe import Recipe
from shiftadd_cli.recipe_file import packaged_names

F = TypeVar("F", bound=Callable[..., Any])


class _NumberOrWord(click.ParamType):
    """Converts digits to an int and keeps other text, which the recipe validates."""

    name = "number|word"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        try:
            return int(value)
        except ValueError:
            return str(value)


class _Choices(click.ParamType):
    """Converts `2,3,shift2` to a tuple of ints and words, which the recipe validates."""

    name = "choice,choice,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | str, ...]:
        parts = [part.strip() for part in str(value).split(",")]
        return tuple(int(part) if part.isdecimal() else part for part in parts)


def recipe_options(function: F) -> F:
    """Add one option per field of `Recipe`, in field order; an option that is not given arrives as None or ()."""
    return recipe_options_without()(function)


def recipe_options_without(*fields: str) -> Callable[[F], F]:
    """The same as `recipe_options`, without the options of the given fields."""

    def add(function: F) -> F:
        for name, field in reversed(Recipe.model_fields.items()):
            if name not in fields:
                function = _option(name, field)(function)
        return function

    return add


def recipe_choice(function: F) -> F:
    """Add `--recipe`, which arrives as `recipe`: a packaged name or a path, for `Recipe.load`."""
    return click.option(
        "--recipe",
        metavar="NAME|FILE",
        shell_complete=names_or_files(*packaged_names()),
        default="default",
        show_default=True,
        help=f"Recipe to start from: a YAML file, or one of {', '.join(packaged_names())}.",
    )(function)


def overrides_from(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe fields that the user set among the arguments of a command, for `Recipe.load`."""
    given = {name: arguments[name] for name in Recipe.model_fields if name in arguments}
    return {name: value for name, value in given.items() if value is not None and value != ()}


def option_name(field: str) -> str:
    """The long option of a recipe field."""
    return "--" + field.replace("_", "-")


@cache
def _default_recipe() -> Recipe:
    """The recipe `default`, cached because every command reads every field."""
    return Recipe.load()


def default_text(name: str) -> str:
    """The value of a field in the recipe `default`, as a user would type it."""
    recipe = _default_recipe()
    value = getattr(recipe, name)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _option(name: str, field: FieldInfo) -> Callable[[F], F]:
    flag = option_name(name)
    settings: dict[str, Any] = {"default": None, "help": f"{field.description}  [default: {default_text(name)}]"}
    annotation = field.annotation
    origin = get_origin(annotation)
    if annotation is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif origin is Literal:
        choices = get_args(annotation)
        if all(isinstance(choice, str) for choice in choices):
            settings["type"] = click.Choice(choices)
        else:  # click below 8.2 only supports strings
            settings |= {"type": _NumberOrWord(), "metavar": "|".join(map(str, choices))}
    elif annotation == str | None:
        settings |= {"type": click.STRING, "metavar": "SIZE" if name == "target_size" else "FILE"}
    elif annotation == float | None:
        settings["type"] = click.FLOAT
    elif annotation == int | None:
        settings["type"] = click.INT
    elif origin in (Union, types.UnionType):
        settings["type"] = _NumberOrWord()
        settings["metavar"] = _WORDS[name]
    elif annotation == tuple[Choice, ...]:
        settings |= {"type": _Choices(), "metavar": "N|FORM,..."}
    elif origin is tuple:
        settings |= {"type": click.STRING, "multiple": True, "metavar": "PATTERN"}
    elif annotation in (int, float, str):
        settings["type"] = annotation
    else:
        raise TypeError(f"no option type for recipe field {name!r} of type {annotation!r}")
    return click.option(flag, name, **settings)


# Metavars of the fields that take a number or a word.
_WORDS = {"group_size": "N|all", "group_rows": "N|all|1/N", "embedding_bits": "N|FORM"}

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names_or_files(*names: str) -> Completer:
    """A completer for these names and for files on disk."""

    def complete(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
        items = [CompletionItem(name) for name in names if name.startswith(typed)]
        return [*items, CompletionItem(typed, type="file")]

    return complete


a_model = names_or_files("demo")


dtype_option = click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    default="auto",
    show_default=True,
    help="Data type of the computation; 'auto' is the stored type, or float32 on a CPU without instructions for it.",
)

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Number of CPU threads.  [default: torch's choice]"
)

remote_code_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code that ships with a model if transformers does not know its architecture. Read the code "
    "first: it runs with your permissions.",
)

team_timeout_option = click.option(
    "--team-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=7200,
    show_default=True,
    help="Under torchrun with several processes: how long they wait for one another.",
)


def scoring_options(function: F) -> F:
    """Add `--context`, `--max-tokens` and `--dtype`, which arrive as `context`, `max_tokens` and `dtype`."""
    for option in (
        dtype_option,
        click.option(
            "--max-tokens",
            type=click.IntRange(min=2),
            help="Use at most this many tokens, from the start of each text.  [default: all]",
        ),
        click.option(
            "--context",
            type=click.IntRange(min=2),
            help="Tokens per window; windows do not overlap.  [default: 512, or the models' maximum if that is less]",
        ),
    ):
        function = option(function)
    return function
