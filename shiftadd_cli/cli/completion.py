"""What a shell offers where a name or a file may stand, see https://click.palletsprojects.com/shell-completion."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names_or_files(*names: str) -> Completer:
    """Completes these names, and besides whatever the shell finds on the disk."""

    def complete(_: click.Context, __: click.Parameter, typed: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names if name.startswith(typed)]
        return [*found, CompletionItem(typed, type="file")]

    return complete


a_model = names_or_files("demo")
