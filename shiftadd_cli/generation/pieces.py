"""Tokens to text one by one, without taking back what was shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens of the prompt that the first new token is decoded with; more can change nothing but the work.
_CONTEXT = 8

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextPieces:
    """The text that new tokens add to a prompt, piece by piece as the tokens come.

    All pieces together are what the tokenizer makes of the prompt and the new tokens, less what it makes of the prompt:
    tokens are decoded after those before them, since the space at a word's beginning is lost from a token that stands
    alone. A character whose bytes come in several tokens is held back until it is whole. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = max(0, len(self._ids) - _CONTEXT)
        self._shown = len(self._ids)

    def add(self, token: int) -> str:
        """What can be shown of the text now that `token` is known; often one word or less."""
        self._ids.append(token)
        piece = self._held()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return piece

    def finish(self) -> str:
        """What was held back: the beginning of a character that never became whole, or nothing."""
        piece = self._held()
        self._start = self._shown = len(self._ids)
        return piece

    def _held(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
