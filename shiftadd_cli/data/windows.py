"""Cutting a string of tokens into windows for calibration and measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """The consecutive windows of a string of tokens, made by `cut_windows`.

    Attributes:
        whole: int64 `[windows, length]`.
        rest: int64 `[up to length - 1]`, the last and shorter window; empty if there is none.
        prefix: ids of the special tokens that every window begins with.
    """

    whole: Tensor
    rest: Tensor
    prefix: tuple[int, ...]

    @property
    def unscored(self) -> int:
        """Tokens at the start of each window that are not predicted: its prefix, or at least the first token."""
        return max(1, len(self.prefix))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window, including its prefix."""
        return [self.whole.shape[1]] * len(self.whole) + ([len(self.rest)] if len(self.rest) else [])

    @property
    def scored_tokens(self) -> int:
        """The number of tokens that are predicted from the tokens before them in their window."""
        return sum(length - self.unscored for length in self.lengths)

    def batches(self, size: int) -> Iterator[Tensor]:
        """The windows in order, int64 `[up to size, length]`; a shorter last window is a batch of its own."""
        # Splitting nothing would yield one empty batch.
        if len(self.whole):
            yield from self.whole.split(size)
        if len(self.rest):
            yield self.rest.unsqueeze(0)

    def batch_count(self, size: int) -> int:
        """The number of batches that `batches` yields."""
        return -(-len(self.whole) // size) + bool(len(self.rest))


def cut_windows(tokens: Tensor, length: int, prefix: Sequence[int] = ()) -> Windows:
    """Cut `tokens` (int64 `[n]`) into windows of `length` tokens that begin with `prefix`, see `leading_tokens`.

    The prefix counts towards the length. A window whose own tokens begin with the prefix, as in a conversation from a
    chat template, gets no second one. Every token is in one window, except in a last window that would predict none.

    Raises:
        ValueError: `length` leaves no room for a token to predict.
    """
    if length <= max(1, len(prefix)):
        raise ValueError(f"a window of {length} tokens has no room for a token to predict")
    head = torch.tensor(prefix, dtype=torch.int64)
    full: list[Tensor] = []
    rest = torch.empty(0, dtype=torch.int64)
    start = 0
    while start < len(tokens):
        begins = torch.equal(tokens[start : start + len(head)], head)
        end = start + length - (0 if begins else len(head))
        window = tokens[start:end] if begins else torch.cat((head, tokens[start:end]))
        if len(window) == length:
            full.append(window)
        elif len(window) > max(1, len(prefix)):
            rest = window
        start = end
    stacked = torch.stack(full) if full else torch.empty(0, length, dtype=torch.int64)
    return Windows(stacked, rest, tuple(prefix))
