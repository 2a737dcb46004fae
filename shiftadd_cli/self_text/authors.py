"""Tokens of a model's own text that are not sampled: first tokens, and those that a chat template adds to messages.

An author fills one piece of text. It begins with its own tokens. Then it receives each sampled token and returns the
tokens that follow in the piece, usually that token alone. Drawing first tokens from the whole vocabulary is from
LLM-QAT (arXiv 2305.17888, section 3.1). Letting an aligned model write the user's messages, by giving it the chat
template up to them, is from Magpie (arXiv 2406.08464, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from shiftadd_cli.data.conversations import render
from shiftadd_cli.errors import CalibrationError
from shiftadd_cli.source.tokenizer import leading_tokens

# An exchange is a user message and its answer. A third one would add little but thanks.
EXCHANGES = 2
# Tokens of the longest question, so that about half of a piece is left for the answer.
QUESTION = 64
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Author(Protocol):
    """Decides how one piece continues."""

    @property
    def may_stop(self) -> bool:
        """Whether the next token may end a text or message; an empty one may not end."""

    def begin(self) -> list[int]:
        """The first tokens of the piece, at least one."""

    def follow(self, token: int) -> list[int]:
        """The next tokens of the piece after `token` was sampled, at least one."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a model by their purpose.

    Attributes:
        leading: ids that the tokenizer puts before every text.
        stops: ids of special tokens, which end a text or a message; below `size`.
        first: ids that a text can begin with: not special, not blank, and not part of a character.
        size: rows of the embedding.
    """

    leading: tuple[int, ...]
    stops: frozenset[int]
    first: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, tokenizer: Any, size: int, ends: Iterable[int] = ()) -> Vocabulary:
        """ends: ids that end a text in the model's own settings.

        Raises:
            CalibrationError: no token can begin a text.
        """
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number for number, token in added.items() if token.special}
        stops = frozenset(stop for stop in special | set(tokenizer.all_special_ids) | set(ends) if stop < size)
        plain = [number for number in range(min(size, len(tokenizer))) if number not in stops]
        texts = [tokenizer.decode([number]) for number in plain]
        first = tuple(number for number, text in zip(plain, texts, strict=True) if text.strip() and _BROKEN not in text)
        if not first:
            raise CalibrationError(
                f"The tokenizer {type(tokenizer).__name__} has no token that a text can begin with, so the model "
                "cannot write its own calibration text; give `calibration` a file, or builtin."
            )
        return cls(leading_tokens(tokenizer), stops, first, size)

    def draw_first(self, generator: torch.Generator) -> int:
        """A token that a text can begin with; all are equally likely."""
        return self.first[int(torch.randint(len(self.first), (), generator=generator))]


class DocumentAuthor:
    """Fills a piece with one document, which may not end, because a second beginning would follow.

    The document begins with the tokenizer's leading tokens and a token drawn from the vocabulary. If there are leading
    tokens, every second document lets the model choose the token after them.
    """

    may_stop = False

    def __init__(self, vocabulary: Vocabulary, generator: torch.Generator, number: int) -> None:
        self._vocabulary, self._generator, self._number = vocabulary, generator, number

    def begin(self) -> list[int]:
        leading = list(self._vocabulary.leading)
        if leading and self._number % 2:
            return leading
        return [*leading, self._vocabulary.draw_first(self._generator)]

    def follow(self, token: int) -> list[int]:
        return [token]


@dataclass(frozen=True)
class ChatForm:
    """The tokens that a chat template puts around messages.

    Attributes:
        opening: before the first user message, including the tokenizer's leading tokens.
        to_assistant: between a user message and the answer; to_user: between an answer and the next message.
        closing: after the last answer; may be empty.
    """

    opening: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    closing: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: Vocabulary) -> ChatForm | None:
        """The form of the tokenizer's chat template. None without a template, or where the model cannot signal the end
        of a message because the template marks it with no special token or changes the messages."""
        if getattr(tokenizer, "chat_template", None) is None:
            return None
        marks = ["Ask0one", "Say0two", "Ask3four", "Say5six"]
        roles = ["user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            text = render(messages, tokenizer, where="A window of the model's own text")
        except CalibrationError:
            return None
        parts = []
        for mark in marks:
            before, separator, text = text.partition(mark)
            if not separator or mark in text:
                return None
            parts.append(before)
        opening, to_assistant, to_user, again = (
            tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts
        )
        closing = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        # Every window begins with the leading tokens, even where the template leaves them to the tokenizer.
        if opening[: len(vocabulary.leading)] != vocabulary.leading:
            opening = (*vocabulary.leading, *opening)
        marked = all(vocabulary.stops.intersection(between) for between in (to_assistant, to_user))
        if not opening or not marked or to_assistant != again:
            return None
        return cls(opening, to_assistant, to_user, closing)


class ChatAuthor:
    """Fills a piece with consecutive conversations, each of `EXCHANGES` questions and answers.

    A question ends where the model ends it, or after `QUESTION` tokens: at a high temperature a model rarely ends one.
    """

    def __init__(self, form: ChatForm, stops: frozenset[int]) -> None:
        self._form, self._stops = form, stops
        self._messages = self._written = 0

    @property
    def may_stop(self) -> bool:
        return self._written > 0

    def begin(self) -> list[int]:
        self._messages = self._written = 0
        return list(self._form.opening)

    def follow(self, token: int) -> list[int]:
        is_question = self._messages % 2 == 0
        if token in self._stops:
            return self._end(token)
        self._written += 1
        return [token, *self._end(token)] if is_question and self._written == QUESTION else [token]

    def _end(self, token: int) -> list[int]:
        """The tokens that follow a message that ended with `token`."""
        self._messages += 1
        self._written = 0
        if self._messages % 2:
            return list(self._form.to_assistant)
        if self._messages < 2 * EXCHANGES:
            return list(self._form.to_user)
        # Without a closing in the template, the sampled token ends the conversation.
        return [*(self._form.closing or (token,)), *self.begin()]
