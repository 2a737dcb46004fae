"""Conversations as the text that a model reads, rendered by its chat template."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, TypeGuard

from shiftadd_cli.errors import CalibrationError, first_line

FIELD = "messages"
# Types of text parts, as named in chat and response APIs.
_TEXTS = ("text", "input_text", "output_text")


def is_conversation(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether this is a list of messages, each with the role of its author; the list may be empty."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )


def render(messages: list[dict[str, Any]], tokenizer: Any, *, where: str) -> str:
    """The text of a conversation, including special tokens.

    tokenizer: the model's tokenizer, or None. where: the location of the messages, for errors. Contents may be lists,
    see `for_template`.

    Raises:
        CalibrationError: there is no chat template, it rejects these messages, or a part of one is not text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where} holds a conversation, and the tokenizer has no chat template; write it out as text instead."
        )
    messages = for_template(messages, tokenizer, where=where)
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs and can raise anything
        raise CalibrationError(
            f"{where} holds a conversation that the chat template rejects ({first_line(error)}); leave it out."
        ) from error
    return rendered


def for_template(messages: list[dict[str, Any]], tokenizer: Any, *, where: str) -> list[dict[str, Any]]:
    """The messages with contents in the form that the chat template of `tokenizer` accepts.

    A content is a string, or a list of parts such as `{"type": "text", "text": "..."}`. Most templates would print such
    a list in its Python form, so the texts of a list are joined by line breaks. Only a template that iterates over
    parts and drops strings gets lists, even in place of strings.

    Raises:
        CalibrationError: a part is not text, or a content has another type.
    """
    wants_parts = _wants_parts(tokenizer, str(tokenizer.chat_template))
    converted = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            texts = [_text(part, where) for part in content]
            content = [{"type": "text", "text": text} for text in texts] if wants_parts else "\n".join(texts)
        elif isinstance(content, str) and wants_parts:
            content = [{"type": "text", "text": content}]
        elif content is not None and not isinstance(content, str):
            raise CalibrationError(
                f"{where} holds a message whose content is neither a text nor a list of parts (but a "
                f"{type(content).__name__}); repair it, or leave the conversation out."
            )
        converted.append({**message, "content": content} if "content" in message else message)
    return converted


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = fields.get("type", "text" if "text" in fields else None)
    text = fields.get("text")
    if kind in _TEXTS and isinstance(text, str):
        return text
    named = f"a part of type {kind!r}" if isinstance(kind, str) else "a part without a type"
    raise CalibrationError(f"{where} holds a message with {named}, and only text is read; leave the conversation out.")


# Cached, because templates are long and there are many conversations.
@lru_cache(maxsize=4)
def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether the template prints the text of parts, but not a string. `template` is only a cache key."""
    word = "shiftadd"
    parts = [{"type": "text", "text": word}]
    as_string, as_parts = (_try(tokenizer, content) for content in (word, parts))
    printed = str(parts) in as_parts or json.dumps(parts) in as_parts
    return word not in as_string and word in as_parts and not printed


def _try(tokenizer: Any, content: Any) -> str:
    """The rendered text of a user message; empty where the template fails."""
    try:
        rendered: str = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # templates are programs and can raise anything
        return ""
    return rendered
