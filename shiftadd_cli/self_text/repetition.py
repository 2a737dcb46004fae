"""Recognising text in which the model fell into a loop."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of a phrase, and the share of phrases in half a window that may have been there before. Measured on windows of
# 512 tokens of SmolLM2: one in a hundred of the Brown corpus has .12 in all, and of Python's documentation .33.
# A window that loops has over .5.
PHRASE = 4
MOST_REPEATED = 0.4


def repeated_share(tokens: Tensor) -> float:
    """The share of phrases of `PHRASE` tokens, int64 `[n]`, that occurred before; 0 for a text shorter than two."""
    if len(tokens) <= PHRASE:
        return 0.0
    phrases = tokens.unfold(0, PHRASE, 1)
    return 1 - len(torch.unique(phrases, dim=0)) / len(phrases)


def is_degenerate(tokens: Tensor) -> bool:
    """Whether one of the halves of a text, int64 `[n]`, or the half in its middle, mostly repeats itself."""
    size = max(PHRASE + 1, len(tokens) // 2)
    starts = range(0, max(1, len(tokens) - size + 1), max(1, size // 2))
    return any(repeated_share(tokens[start : start + size]) > MOST_REPEATED for start in starts)
