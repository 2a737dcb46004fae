"""Cutting a string of tokens into the windows a model is measured on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def window_lengths(tokens: int, context: int) -> list[int]:
    """Lengths of the consecutive windows of a string of `tokens` tokens.

    All have `context` tokens but the last, which has what is left; a single token left over is dropped, for it
    predicts nothing.
    """
    whole, rest = divmod(tokens, context)
    return [context] * whole + ([rest] if rest >= 2 else [])


def scored_tokens(tokens: int, context: int) -> int:
    """How many tokens are scored: all but the first of each window."""
    return sum(length - 1 for length in window_lengths(tokens, context))


def batches(tokens: Tensor, context: int, batch_size: int) -> Iterator[Tensor]:
    """The windows of `tokens` (`[n]`) in order, as views `[up to batch_size, context]`; a shorter last one alone."""
    whole = len(tokens) // context
    # Splitting nothing would yield one empty batch.
    if whole:
        yield from tokens[: whole * context].view(whole, context).split(batch_size)
    rest = tokens[whole * context :]
    if len(rest) >= 2:
        yield rest.unsqueeze(0)


def batch_count(tokens: int, context: int, batch_size: int) -> int:
    """How many batches `batches` yields."""
    whole, rest = divmod(tokens, context)
    return -(-whole // batch_size) + (rest >= 2)
