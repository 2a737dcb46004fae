"""Turns tokens into text one by one, without ever changing text already shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Number of prompt tokens that the first new token is decoded with; more would only take longer.
_CONTEXT = 8

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextPieces:
    """The text that new tokens add to a prompt, piece by piece as the tokens come.

    All pieces together are the tokenizer's text of the prompt and the new tokens, minus its text of the prompt alone.
    Tokens are decoded together with those before them, since a token decoded alone loses the space at the beginning of
    a word. A character whose bytes span several tokens is held back until it is complete. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = max(0, len(self._ids) - _CONTEXT)
        self._shown = len(self._ids)

    def add(self, token: int) -> str:
        """The text that can be shown after `token`; often one word or less."""
        self._ids.append(token)
        piece = self._pending()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return piece

    def finish(self) -> str:
        """The text held back: the beginning of a character that was never completed, or nothing."""
        piece = self._pending()
        self._start = self._shown = len(self._ids)
        return piece

    def _pending(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
