"""Conversations as the text that a model reads: what its chat template makes of them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, TypeGuard

from shiftadd_cli.errors import CalibrationError, first_line

FIELD = "messages"
# Types of parts that are text, by the names of chat and response interfaces.
_TEXTS = ("text", "input_text", "output_text")


def is_conversation(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """Whether this is a list of messages, each with the role of who wrote it; there may be none."""
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) for each in value
    )


def render(messages: list[dict[str, Any]], tokenizer: Any, *, where: str) -> str:
    """The text of a conversation, special tokens included.

    tokenizer: that of the model, or None. where: what the messages stand in, for errors. Contents may be lists, see
    `for_template`.

    Raises:
        CalibrationError: there is no chat template, it does not take these messages, or a part of one is no text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where} holds a conversation, and the tokenizer has no chat template; write it out as text instead."
        )
    messages = for_template(messages, tokenizer, where=where)
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs, which raise whatever their messages lead them to
        raise CalibrationError(
            f"{where} holds a conversation that the chat template does not take ({first_line(error)}); leave it out."
        ) from error
    return rendered


def for_template(messages: list[dict[str, Any]], tokenizer: Any, *, where: str) -> list[dict[str, Any]]:
    """The messages with contents as the chat template of `tokenizer` takes them.

    A content is a string, or a list of parts such as `{"type": "text", "text": "..."}`, of which most templates would
    print the Python form. Texts of a list are joined by line breaks. Only a template that iterates over parts and drops
    strings gets lists, also in place of strings.

    Raises:
        CalibrationError: a part is no text, or a content of another type.
    """
    wants_parts = _wants_parts(tokenizer, str(tokenizer.chat_template))
    found = []
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
                f"{type(content).__name__}); mend it, or leave the conversation out."
            )
        found.append({**message, "content": content} if "content" in message else message)
    return found


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


# Templates are long, and conversations many.
@lru_cache(maxsize=4)
def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether the template shows the text of parts, and not that of a string. `template` tells changes of it."""
    word = "shiftadd"
    parts = [{"type": "text", "text": word}]
    as_string, as_parts = (_try(tokenizer, content) for content in (word, parts))
    printed = str(parts) in as_parts or json.dumps(parts) in as_parts
    return word not in as_string and word in as_parts and not printed


def _try(tokenizer: Any, content: Any) -> str:
    """What the template makes of a message of the user; nothing where it fails."""
    try:
        rendered: str = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # templates are programs, which raise whatever their messages lead them to
        return ""
    return rendered
