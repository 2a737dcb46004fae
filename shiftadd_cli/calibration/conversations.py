"""Conversations as the text that a model reads: what its chat template makes of them."""

from __future__ import annotations

from typing import Any, TypeGuard

from shiftadd_cli.errors import CalibrationError, first_line

FIELD = "messages"


def is_conversation(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether this is a list of messages, each with the role of who wrote it; there may be none."""
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) for each in value
    )


def render(messages: list[dict[str, Any]], tokenizer: Any, *, where: str) -> str:
    """The text of a conversation, special tokens included.

    tokenizer: that of the model, or None. where: what the messages stand in, for errors.

    Raises:
        CalibrationError: there is no chat template, or it does not take these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where} holds a conversation, and the tokenizer has no chat template; write it out as text instead."
        )
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs, which raise whatever their messages lead them to
        raise CalibrationError(
            f"{where} holds a conversation that the chat template does not take ({first_line(error)}); leave it out."
        ) from error
    return rendered
